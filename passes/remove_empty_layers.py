"""Remove layers in which nothing is left: what they add is zero, whatever the inputs are.

    x + 0 -> x      x - 0 -> x      0 - x -> -x      Sum(x, 0, y) -> Sum(x, y)      where the result keeps its shape
    f(...) = 0 -> a constant        where the shape of a zero is known and something else needs it (Concat, Where, ...)

What only the removed term needed (a norm, projections, their parameters) goes with it, as does x * 1. The rules of
the channels (`channel_rules`) say what is zero. Exact for finite values, but for the sign of a zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.fixpoint import find_zeros
from cpcompile.passes.channels import Channels
from cpcompile.passes.clean_up import SMALL, CleanUp, stand_in
from cpcompile.passes.symbolic_shapes import SINCE, broadcast, is_standard, nodes_inside_out, opset_of

SUMS = ("Add", "Sub", "Sum")


@dataclass
class EmptyLayers(ir.passes.PassResult):
    """`sums`: the results of the sums that lost a term, `zeros`: the values that became a constant."""

    sums: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()


@dataclass(frozen=True)
class RemoveEmptyLayers(ir.passes.InPlacePass):
    """Remove terms that are zero, and what they were computed with, until none is left."""

    clean_up: CleanUp = field(default_factory=CleanUp)

    def call(self, model: ir.Model) -> EmptyLayers:
        """Edit `model`; `modified` counts removed terms, new constants and what was cleaned up."""
        graph = model.graph
        if opset_of(graph) < SINCE:
            return EmptyLayers(model, modified=False)
        sums: list[str] = []
        modified = self.clean_up(model).modified
        while lost := remove_zero_terms(graph):
            sums += lost
            self.clean_up(model)
        if zeros := _make_constants(graph):
            self.clean_up(model)
        return EmptyLayers(model, bool(modified or sums or zeros), tuple(sums), tuple(zeros))


def remove_zero_terms(graph: ir.Graph) -> list[str]:
    """Take zero terms from sums whose shape the other terms give; returns the names of their results."""
    channels = find_zeros(graph)
    sums = [(node.outputs[0].name or "", node) for node in nodes_inside_out(graph) if node.op_type in SUMS]
    return [name for name, node in sums if is_standard(node) and _loses_terms(channels, node)]


def _loses_terms(channels: Channels, node: ir.Node) -> bool:
    terms = [value for value in node.inputs if value is not None]
    wanted = channels.shape(node.outputs[0])
    if wanted is None:
        return False
    kept = list(terms)
    for value in reversed(terms):
        left = [other for other in kept if other is not value]
        if left and _is_zero(channels, value) and broadcast([channels.shape(other) for other in left]) == wanted:
            kept = left
    if len(kept) == len(terms):
        return False
    if node.op_type == "Sub" and kept == terms[1:]:
        _replace(node, ir.node("Neg", kept, name=node.name))
    elif len(kept) > 1:
        _replace(node, ir.node("Sum", kept, name=node.name))
    elif stand_in(kept[0], node.outputs[0]):
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    else:
        # What the model takes in or stores cannot itself be its output.
        _replace(node, ir.node("Identity", kept, name=node.name))
    return True


def _is_zero(channels: Channels, value: ir.Value) -> bool:
    return channels.shape(value) is not None and channels.zero(value).everything


def _replace(node: ir.Node, other: ir.Node) -> None:
    """Let `other` make the result of `node`."""
    graph, old, new = node.graph, node.outputs[0], other.outputs[0]
    assert graph is not None
    graph.insert_before(node, other)
    name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    old.name, new.name = f"{name}.replaced", name


def _make_constants(graph: ir.Graph) -> list[str]:
    """Store the zeros of known shape that something reads; returns their names, without those that only led to them."""
    channels = find_zeros(graph)
    made = []
    for node in reversed(list(nodes_inside_out(graph))):
        for out in node.outputs:
            shape = out.shape.numpy() if out.shape is not None and out.shape.is_static() else None
            if shape is None or out.dtype is None or not out.uses() or out.is_graph_output():
                continue
            small = np.prod(shape, dtype=np.int64) <= SMALL
            if not small or not out.dtype.is_floating_point() or not _is_zero(channels, out):
                continue
            name = f"{out.name}.zero"
            tensor = ir.tensor(np.zeros(shape, dtype=out.dtype.numpy()), dtype=out.dtype, name=name)
            constant = ir.Value(name=name, shape=ir.Shape(shape), type=out.type, const_value=tensor)
            graph.register_initializer(constant)
            ir.convenience.replace_all_uses_with(out, constant)
            made.append(out.name or "")
        if made and not any(out.uses() or out.is_graph_output() for out in node.outputs):
            assert node.graph is not None
            node.graph.remove(node, safe=True)
    return made[::-1]
