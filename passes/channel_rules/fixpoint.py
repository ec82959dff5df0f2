"""What all rules agree on: the zeros of every value, and the greatest set of channels that can be cut together.

One set of masks spans the graph and the subgraphs of its If, Loop and Scan: a value that a subgraph reads from outside
is the same value there. A call to a function has no rule and keeps what it touches: inline functions first
(onnx_ir's InlinePass, which `cpcompile opt` runs).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from cpcompile.core.cache import HEADS
from cpcompile.passes.channel_rules import rule_of
from cpcompile.passes.channel_rules.subgraphs import common_zeros, loop_carried_values, owners
from cpcompile.passes.channels import EMPTY, Channels, Zeros
from cpcompile.passes.nodes import post_order, subgraphs_of
from cpcompile.passes.shape_rules import infer_symbolic_shapes


def find_zeros(graph: ir.Graph, opaque: frozenset[str] = frozenset()) -> Channels:
    """Which slices are zero whatever the inputs are, without saying what can be cut.

    opaque: names of initializers that count as not zero, whatever they hold.
    """
    channels = Channels(infer_symbolic_shapes(graph), owners(graph), opaque)
    _propagate_zeros(channels, graph)
    return channels


def _propagate_zeros(channels: Channels, graph: ir.Graph) -> None:
    for node in graph:
        _enter_subgraphs(channels, node)
        rule = rule_of(node)
        for out in node.outputs:
            channels.zeros.pop(out, None)
        zeros = rule.zeros(channels, node) if rule else None
        for out, known in zip(node.outputs, zeros or (), strict=False):
            shape = channels.shape(out)
            if shape is not None and [mask.size for mask in known.axes] == [axis.n for axis in shape]:
                channels.zeros[out] = known


def _enter_subgraphs(channels: Channels, node: ir.Node) -> None:
    """Zeros inside subgraphs: a state that starts as zero counts as zero as long as every iteration leaves it so."""
    entering = [(each.inside, each.sources) for each in loop_carried_values(channels, node) if each.inside]
    for inside, sources in entering:
        if (start := common_zeros(channels, inside, sources[:1])) is not None:
            channels.zeros[inside[0]] = start
    weaker = True
    while weaker:
        weaker = False
        for subgraph in subgraphs_of(node):
            _propagate_zeros(channels, subgraph)
        for inside, sources in entering:
            left = common_zeros(channels, inside, [inside, *sources])
            before = channels.zeros.get(inside[0])
            if left is not None and before is not None and _count(left) < _count(before):
                channels.zeros[inside[0]] = left
                weaker = True


def _count(zeros: Zeros) -> int:
    return zeros.everything + sum(int(mask.sum()) for mask in zeros.axes)


def find_channels(
    graph: ir.Graph, zeros: Channels | None = None, caches: Collection[ir.Value] = frozenset()
) -> Channels:
    """The zeros and the greatest set of channels that can be cut together.

    zeros: the result of `find_zeros` for the graph as it is, if there is one already. caches: inputs and outputs of
    which heads may be cut.
    """
    channels = zeros or find_zeros(graph)
    nodes = list(post_order(graph))
    for value in (*graph.inputs, *graph.outputs):
        for node in channels.neighbours(value)[:1]:
            axes = [axis for axis in range(len(channels.shape(value) or ())) if axis != HEADS or value not in caches]
            channels.keep(value, node, "it is an input or output of the model", axes=axes)
    for node in nodes:
        rule = rule_of(node)
        if rule is None:
            borders = [value for subgraph in subgraphs_of(node) for value in (*subgraph.inputs, *subgraph.outputs)]
            for touched in (*node.inputs, *node.outputs, *borders):
                channels.keep(touched, node, f"there is no rule for {node.op_type}")
        else:
            for setting in node.inputs[rule.data :]:
                channels.keep(setting, node, "it is a setting")
    channels.changed = dict.fromkeys(nodes)
    while channels.changed:
        node = next(iter(channels.changed))
        del channels.changed[node]
        if rule := rule_of(node):
            channels.consult(node, rule.agree)
        if not channels.changed:
            _spare_one(channels)
    channels.settled = True
    return channels


def _spare_one(channels: Channels) -> None:
    """A tensor that would lose all channels of an axis keeps one: it is zero, and there is no empty tensor."""
    empty = next((cell for cell, mask in channels.cells if mask.size and mask.all()), None)
    if empty is not None:
        value, axis = empty
        first = np.arange(channels.cut(value, axis).size) > 0
        channels.couple([(value, axis)], channels.neighbours(value)[0], limit=first, why=EMPTY)
