"""Remove experts that no token can be routed to: their slices of the stacked weights and their rows of the router.

    logits -> mask (-inf) -> softmax -> TopK -> numbers -> Gather(stacked, numbers)
    becomes, where `kept` lists the experts that are not masked,
    Gather(logits, kept) -> softmax -> TopK -> numbers -> Gather(Gather(stacked, kept), numbers)

Nothing needs the others then: `EliminateDeadChannels` cuts them out of the parameters, and `RemoveWholeGathers`
removes the Gathers that now take everything. Values stay: exp(-inf) = 0 adds nothing to the softmax, and as TopK picks
no more experts than are left (else it is an error), it picks a masked one only in place of another whose weight has
underflowed to 0 as well. `kept` ascends, so that ties are decided as before.

Where as many are left as TopK picks, every token has the same experts, but their weights are still the softmax of
their logits: their rows of the router stay, and so does TopK, which only sorts then.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpcompile.core.errors import UsageError
from cpcompile.passes.eliminate_dead_channels import Blocked
from cpcompile.passes.expert_routes import Choice, axis_of, choice_of, lookups_of, parameters_of
from cpcompile.passes.nodes import constant_of
from cpcompile.passes.operators import is_standard
from cpcompile.passes.opset import MinOpsetPass


@dataclass(frozen=True)
class Router:
    """One TopK, and the experts that it can still pick."""

    parameters: tuple[str, ...]
    """Initializers that lose something with every expert: first those of the router, then what is stacked by expert."""
    experts: int
    picked: int
    kept: tuple[int, ...]

    @property
    def removed(self) -> tuple[int, ...]:
        """The experts that are gone."""
        return tuple(sorted({*range(self.experts)} - {*self.kept}))


@dataclass
class Pruning(ir.passes.PassResult):
    """`routers` lost experts; `blocked` says which could not, and why."""

    routers: tuple[Router, ...] = ()
    blocked: tuple[Blocked, ...] = ()


@dataclass(frozen=True)
class PruneExperts(MinOpsetPass):
    """Let every TopK choose among the experts that are not masked; UsageError if it picks more than that."""

    def call(self, model: ir.Model) -> Pruning:
        """Edit `model`; `modified` counts routers that lost experts."""
        routers, blocked = [], []
        for node in list(model.graph):
            choice = choice_of(node) if node.op_type == "TopK" and is_standard(node) else None
            if choice is None:
                continue
            lookups, picked = lookups_of(node, choice.count), constant_of(node.inputs[1]) if node.inputs[1] else None
            if picked is None or isinstance(lookups, str):
                why = lookups if isinstance(lookups, str) else "how many it picks is not constant"
                masked, name = int(choice.masked.sum()), choice.logits.name or ""
                blocked.append(
                    Blocked(name, len(choice.logits.shape or ()) - 1, masked, node.name or "", node.op_type, why)
                )
            else:
                routers.append(_prune(node, choice, lookups, int(picked.numpy().item())))
        return Pruning(model, bool(routers), tuple(routers), tuple(blocked))


def _prune(topk: ir.Node, choice: Choice, lookups: list[ir.Node], picked: int) -> Router:
    kept, count = np.flatnonzero(~choice.masked), choice.count
    names = dict.fromkeys(parameters_of(choice.logits, count))
    for value in (node.inputs[0] for node in lookups):
        if value is not None and value.shape is not None and len([n for n in value.shape if n != 1]) > 1:  # no gates
            names |= dict.fromkeys(parameters_of(value, count))
    router = Router(tuple(names), count, picked, tuple(kept.tolist()))
    if kept.size < picked:
        raise UsageError(
            f"{next(iter(names), choice.logits.name)} routes every token to {picked} of {count} experts, and only "
            f"{kept.size} of them are not masked; keep at least {picked}"
        )
    graph, name = topk.graph, f"{topk.outputs[1].name}.kept"
    assert isinstance(graph, ir.Graph)
    index = ir.Value(name=name, const_value=ir.tensor(kept.astype(np.int64), name=name))
    index.shape, index.type = ir.Shape(kept.shape), ir.TensorType(ir.DataType.INT64)
    graph.register_initializer(index)
    scores = _pick(topk, topk, choice.logits, index, -1)
    for node in reversed(choice.trail):
        scores = _again(topk, node, scores, index)
    topk.replace_input_with(0, scores)
    for node in lookups:
        data = node.inputs[0]
        assert data is not None
        node.replace_input_with(0, _pick(node, node, data, index, axis_of(node)))
    return router


def _again(topk: ir.Node, node: ir.Node, scores: ir.Value, index: ir.Value) -> ir.Value:
    """Repeat `node`, between logits and `topk`, for the experts in `index` only; a Where is left out."""
    if node.op_type == "Where":
        return scores
    inputs, out = [scores], node.outputs[0]
    if node.op_type == "Add":
        added = next(value for value in node.inputs if value is not None and constant_of(value) is not None)
        inputs.append(_pick(topk, node, added, index, -1))
    new = ir.node(node.op_type, inputs, dict(node.attributes), name=f"{index.name}.{out.name}")
    return _insert(topk, new, out, index, -1)


def _pick(before: ir.Node, reader: ir.Node, value: ir.Value, index: ir.Value, axis: int) -> ir.Value:
    """Pick the positions `index` along an axis of `value`, which `reader` reads."""
    assert value.shape is not None
    name = f"{index.name}.{reader.outputs[0].name}.{value.name}"
    new = ir.node("Gather", [value, index], {"axis": axis % value.shape.rank()}, name=name)
    return _insert(before, new, value, index, axis)


def _insert(before: ir.Node, node: ir.Node, like: ir.Value, index: ir.Value, axis: int) -> ir.Value:
    """Insert `node`, whose result has the type and shape of `like` except for the length of `axis`."""
    out, graph = node.outputs[0], before.graph
    assert graph is not None and like.shape is not None and index.shape is not None
    dims = list(like.shape)
    dims[axis] = index.shape[0]
    out.name, out.type, out.shape = node.name, like.type, ir.Shape(dims)
    graph.insert_before(before, node)
    return out
