"""Give the graphs of several contexts the same cache, so that they can be merged: every layer has as many heads as the
context with the most.

past, 3 heads  ->  Slice(past)    what a context with 2 heads reads
present        <-  Pad(present)   zeros in the place of the third
present        <-  Pad(past)      zeros for every token, in a context that has nothing in the layer
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from cpcompile.core.cache import HEADS, INPUT, LENGTH, PAST
from cpcompile.passes.cache_interface import caches
from cpcompile.passes.nodes import add_constant, integer_node


def with_equal_caches(models: Mapping[str, ir.Model]) -> dict[str, ir.Model]:
    """Copies of the graphs of all contexts whose caches have the same names and shapes; tensors are shared."""
    largest: dict[str, tuple[ir.Value, ir.Value]] = {}
    for model in models.values():
        for past, present in caches(model.graph).items():
            name = past.name or ""
            if name not in largest or _heads(largest[name][0]) < _heads(past):
                largest[name] = past, present
    copies = {context: model.clone() for context, model in models.items()}
    for model in copies.values():
        own = {past.name: (past, present) for past, present in caches(model.graph).items()}
        for pair in own.values():
            model.graph.inputs.remove(pair[0])
            model.graph.outputs.remove(pair[1])
        for name in sorted(largest, key=_place):
            _widen(model.graph, largest[name], own.get(name))
    return copies


def _heads(past: ir.Value) -> int:
    heads = past.shape[HEADS] if past.shape is not None else None
    assert isinstance(heads, int)  # each context keeps a known number of them
    return heads


def _place(name: str) -> tuple[int, str]:
    """Layer, key or value: the order in which a model has its caches."""
    found = PAST.fullmatch(name)
    assert found is not None
    return int(found[1]), found[2]


def _widen(graph: ir.Graph, largest: tuple[ir.Value, ir.Value], own: tuple[ir.Value, ir.Value] | None) -> None:
    """Add an input and an output like `largest` around the past and the present that the graph has of it, if any."""
    past, present = (_like(value) for value in largest)
    graph.inputs.append(past)
    if own is None:
        present = _after_zeros(graph, past, present)
    elif (missing := _heads(past) - _heads(own[0])) == 0:
        own[0].name = f"{past.name}.own"
        ir.convenience.replace_all_uses_with(own[0], past)
        present = own[1]
    else:
        present = _around(graph, past, present, own, missing)
    graph.outputs.append(present)


def _like(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)


def _around(
    graph: ir.Graph, past: ir.Value, present: ir.Value, own: tuple[ir.Value, ir.Value], missing: int
) -> ir.Value:
    """The present with zeros behind the heads of its `own`, which reads the first heads of `past`."""
    axis, bounds = np.array([HEADS]), {"start": [0], "end": [_heads(own[0])]}
    start, end = (add_constant(graph, f"{past.name}.{name}", np.array(at)) for name, at in bounds.items())
    cut = ir.node("Slice", [past, start, end, add_constant(graph, f"{past.name}.axis", axis)], name=f"{past.name}.own")
    graph.insert_before(graph[0], cut)
    cut.outputs[0].name, cut.outputs[0].type, cut.outputs[0].shape = f"{past.name}.own", own[0].type, own[0].shape
    ir.convenience.replace_all_uses_with(own[0], cut.outputs[0])
    own[1].name = f"{present.name}.own"
    sizes = add_constant(graph, f"{present.name}.pads", np.array([0, missing]))
    return _padded(graph, own[1], present, HEADS, sizes)


def _after_zeros(graph: ir.Graph, past: ir.Value, present: ir.Value) -> ir.Value:
    """The present of a layer of which the graph has nothing: zeros, and again zeros for the new tokens."""
    (tokens,) = (value for value in graph.inputs if value.name == INPUT)
    new = integer_node("Shape", [tokens], f"{past.name}.new", start=1, end=2)
    none = add_constant(graph, f"{past.name}.none", np.array([0]))
    sizes = integer_node("Concat", [none, new.outputs[0]], f"{present.name}.pads", axis=0)
    graph.extend([new, sizes])
    return _padded(graph, past, present, LENGTH, sizes.outputs[0])


def _padded(graph: ir.Graph, value: ir.Value, like: ir.Value, axis: int, sizes: ir.Value) -> ir.Value:
    """`value` with zeros on `axis`, as many before and behind as `sizes` says, under the name and shape of `like`."""
    axes = add_constant(graph, f"{like.name}.axes", np.array([axis]))
    node = ir.node("Pad", [value, sizes, None, axes], name=f"{like.name}.pad")
    graph.append(node)
    out = node.outputs[0]
    out.name, out.type, out.shape = like.name, like.type, like.shape
    return out
