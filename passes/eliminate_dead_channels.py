"""Remove channels that are zero and that nothing can tell from absent: the graph gets physically smaller.

    1. zero terms   x + 0 -> x, so that branches in which nothing is left disappear
    2. zeros        forward: which slices of every tensor are zero            (rules: zeros)
    3. cut          greatest fixpoint: which channels every operator can spare (rules: agree)
    4. rewrite      slice initializers, sizes, indices and shapes             (rules: rewrite)
    until nothing changes.

Works on any graph with structural zeros. A contraction sum(a_k * b_k) loses the terms in which a or b is zero;
everything tied to such a channel on its way (the matrix columns that make it, the activations
that carry it) goes with it. Exact for finite values: 0 * x = 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.channel_rules import rule_of
from cpcompile.passes.channels import EMPTY, Channels, Mask
from cpcompile.passes.clean_up import CleanUp, stand_in
from cpcompile.passes.constant_copies import merge_copies, separate_constants
from cpcompile.passes.symbolic_shapes import SINCE, ShapeTable, is_standard, opset_of

KeptChannels = Mapping[str, tuple[npt.NDArray[np.intp] | None, ...]]
"""Initializer -> per axis the kept channels of the original tensor; None where the axis is whole."""


@dataclass(frozen=True)
class Blocked:
    """Zero channels that had to stay, and the operator that is the reason."""

    value: str
    axis: int
    channels: int
    node: str
    operator: str
    reason: str


@dataclass
class Elimination(ir.passes.PassResult):
    """What was removed: initializers that are gone are absent from `kept`."""

    kept: KeptChannels = field(default_factory=dict)
    blocked: tuple[Blocked, ...] = ()


@dataclass(frozen=True)
class EliminateDeadChannels(ir.passes.InPlacePass):
    """Remove dead channels until none is left that the rules can remove."""

    clean_up: CleanUp = field(default_factory=CleanUp)

    def call(self, model: ir.Model) -> Elimination:
        """Edit `model`; `modified` counts removed terms, tensors that got smaller and what was cleaned up."""
        graph = model.graph
        if (opset := opset_of(graph)) < SINCE:
            why = f"the model is in opset {opset}, the rules hold from {SINCE} on: convert it first"
            whole = {name: (None,) * len(v.shape or ()) for name, v in graph.initializers.items()}
            return Elimination(model, False, whole, (Blocked("", 0, 0, "", "", why),))
        edits = int(self.clean_up(model).modified)  # what nothing needs must not keep channels
        copies = separate_constants(graph)
        kept: dict[str, tuple[npt.NDArray[np.intp] | None, ...]] = {
            name: (None,) * len(value.const_value.shape)
            for name, value in graph.initializers.items()
            if value.const_value is not None
        }
        round_edits = 1
        blocked: tuple[Blocked, ...] = ()
        while round_edits:
            round_edits = self.clean_up(model).modified + _remove_zero_terms(graph)
            channels = find_channels(graph)
            values, sliced = _rewrite(graph, channels)
            for name, own in sliced.items():
                kept[name] = tuple(_then(before, now) for before, now in zip(kept[name], own, strict=True))
            round_edits += values
            edits += round_edits
            blocked = _blocked(channels)
        merge_copies(graph, copies, kept)
        kept = {name: axes for name, axes in kept.items() if name in graph.initializers}
        return Elimination(model, edits > 0, kept, blocked)


def find_channels(graph: ir.Graph) -> Channels:
    """The zeros and the greatest set of channels that can be cut together."""
    channels = Channels(ShapeTable(graph))
    _propagate_zeros(graph, channels)
    for value in (*graph.inputs, *graph.outputs):
        producer = value.producer() or next((use.node for use in value.uses()), None)
        if producer is not None:
            channels.keep(value, producer, "it is an input or output of the model")
    for node in graph:
        rule = rule_of(node)
        if rule is None:
            captured = [v for inner in _nodes_inside(node) for v in inner.inputs if v is not None and v.graph is graph]
            for touched in (*node.inputs, *node.outputs, *captured):
                channels.keep(touched, node, f"there is no rule for {node.op_type}")
        else:
            for setting in node.inputs[rule.data :]:
                channels.keep(setting, node, "it is a setting")
    channels.changed.update(dict.fromkeys(graph))
    while channels.changed:
        node = next(iter(channels.changed))
        del channels.changed[node]
        if node.graph is graph and (rule := rule_of(node)):  # nodes of sub-graphs may read values of this one
            channels.consult(node, rule.agree)
        if not channels.changed:
            _spare_one(channels)
    channels.settled = True
    return channels


def _propagate_zeros(graph: ir.Graph, channels: Channels) -> None:
    for node in graph:
        rule = rule_of(node)
        zeros = rule.zeros(channels, node) if rule else None
        for out, known in zip(node.outputs, zeros or (), strict=False):
            shape = channels.shape(out)
            if shape is not None and [mask.size for mask in known.axes] == [axis.n for axis in shape]:
                channels.zeros[out] = known


def _spare_one(channels: Channels) -> None:
    """A tensor that would lose all channels of an axis keeps one: it is zero, and there is no empty tensor."""
    for (value, axis), mask in list(channels.cells):
        if mask.size and mask.all():
            first = np.arange(mask.size) > 0
            node = value.producer() or next(iter(value.uses())).node
            channels.tie([(value, axis)], node, limit=first, why=EMPTY)
            return


def _nodes_inside(node: ir.Node) -> list[ir.Node]:
    """All nodes of the sub-graphs of `node`."""
    graphs = [g for a in node.attributes.values() for g in _graphs_of(a)]
    return [inner for graph in graphs for inner in graph.all_nodes()]


def _graphs_of(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    if attribute.type == ir.AttributeType.GRAPHS:
        return list(attribute.as_graphs())
    return []


def _remove_zero_terms(graph: ir.Graph) -> int:
    """x + 0 -> x and x - 0 -> x, where x has the shape of the sum."""
    channels = Channels(ShapeTable(graph))
    _propagate_zeros(graph, channels)
    removed = 0
    for node in list(graph):
        if node.op_type not in ("Add", "Sub") or not is_standard(node):
            continue
        first, second = node.inputs
        for kept, gone in ((first, second), (second, first))[: 2 if node.op_type == "Add" else 1]:
            if kept is None or gone is None:
                continue
            same = channels.shape(kept) is not None and channels.shape(kept) == channels.shape(node.outputs[0])
            if same and channels.shape(gone) is not None and channels.zero(gone).everything:
                removed += _drop(node, kept)
                break
    return removed


def _drop(node: ir.Node, kept: ir.Value) -> bool:
    """Let `kept` stand in for the result of `node`, by a copy where it cannot itself be an output of the model."""
    graph, out = node.graph, node.outputs[0]
    assert graph is not None
    if not stand_in(kept, out):
        copy = ir.node("Identity", [kept], name=node.name)
        name, copy.outputs[0].type, copy.outputs[0].shape = out.name, out.type, out.shape
        graph.insert_before(node, copy)
        ir.convenience.replace_all_uses_with(out, copy.outputs[0], replace_graph_outputs=True)
        out.name, copy.outputs[0].name = f"{name}.replaced", name
    graph.remove(node, safe=True)
    return True


def _rewrite(graph: ir.Graph, channels: Channels) -> tuple[int, dict[str, tuple[npt.NDArray[np.intp] | None, ...]]]:
    """Cut what the masks say.

    Returns how many values got smaller, and per sliced initializer the kept channels of every axis.
    """
    cut: dict[ir.Value, dict[int, Mask]] = {}
    for (value, axis), mask in channels.cells:
        if mask.any():
            cut.setdefault(value, {})[axis] = mask
    for node in list(graph):
        if (rule := rule_of(node)) and any(value in cut for value in (*node.inputs, *node.outputs)):
            rule.rewrite(channels, node)
    sliced = {}
    for value, masks in cut.items():
        if value.shape is not None:
            dims = list(value.shape)
            for axis, mask in masks.items():
                if isinstance(dims[axis], int):
                    dims[axis] = int((~mask).sum())
                else:
                    dims[axis] = ir.SymbolicDim(None)
            value.shape = ir.Shape(dims)
        if value.is_initializer():
            rank = len(value.const_value.shape) if value.const_value is not None else 0
            own = tuple(np.flatnonzero(~masks[axis]) if axis in masks else None for axis in range(rank))
            _slice_initializer(value, own)
            sliced[value.name or ""] = own
    return len(cut), sliced


def _slice_initializer(value: ir.Value, kept: tuple[npt.NDArray[np.intp] | None, ...]) -> None:
    """Replace the tensor by its slice, which is made only when it is read."""
    tensor = value.const_value
    assert tensor is not None and value.shape is not None

    def make() -> ir.TensorProtocol:
        array = tensor.numpy()
        for axis, indices in enumerate(kept):
            if indices is not None:
                array = array.take(indices, axis=axis)
        return ir.Tensor(array, name=value.name)

    value.const_value = ir.LazyTensor(make, dtype=tensor.dtype, shape=value.shape, name=value.name)


def _then(before: npt.NDArray[np.intp] | None, now: npt.NDArray[np.intp] | None) -> npt.NDArray[np.intp] | None:
    """Kept channels of kept channels, in terms of the original."""
    return before if now is None else now if before is None else before[now]


def _blocked(channels: Channels) -> tuple[Blocked, ...]:
    """Zero channels of activations that stayed, by value, axis and reason."""
    blocked: list[Blocked] = []
    for (value, axis), mask in channels.cells:
        zeros = channels.zeros.get(value)
        if zeros is None or zeros.everything or value.producer() is None:
            continue
        stayed = Counter(channels.reasons((value, axis))[zeros.axes[axis] & ~mask])
        blocked += [
            Blocked(value.name or "", axis, count, reason.node, reason.operator, reason.text)
            for reason, count in stayed.items()
            if reason is not None
        ]
    return tuple(blocked)
