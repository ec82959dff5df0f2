"""Infer types and shapes: what the operators make wins over what the file claims about its values.

    1. onnx.shape_inference on a copy without claims and large weights
    2. what it leaves open and `ShapeTable` derives, and again from 1 with that
    3. claims that this contradicts go (`claims`)
    4. where those that are left say more than it does, once more with them

A default that the caller may replace is no constant: what follows from it alone is not inferred.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from cpcompile.files.onnx_file import opset_of
from cpcompile.passes.claims import drop_wrong_claims
from cpcompile.passes.nodes import post_order
from cpcompile.passes.onnx_inference import inferred
from cpcompile.passes.operators import is_standard
from cpcompile.passes.opset import MIN_OPSET
from cpcompile.passes.shape_rules import infer_symbolic_shapes


@dataclass
class Inference(ir.passes.PassResult):
    """`contradictions`: what the file claimed and its operators do not make, one text for each value."""

    contradictions: tuple[str, ...] = ()


@dataclass(frozen=True)
class InferShapes(ir.passes.InPlacePass):
    """Give values the types and shapes that follow from those of the inputs."""

    def call(self, model: ir.Model) -> Inference:
        """Edit `model`; `modified` counts values about which more, or something else, is known."""
        verified = drop_wrong_claims(model, complete_shapes)
        found = len(verified.wrong) + _take(model, verified.made)
        if verified.more:
            found += _infer(model) + complete_shapes(model)
        return Inference(model, found > 0, verified.wrong)


def complete_shapes(model: ir.Model) -> int:
    """Add the shapes that the table derives, and what inference makes of them; returns how many values got some."""
    added = 0
    while found := _derive(model.graph):
        added += found + _infer(model)
    return added


def _derive(graph: ir.Graph) -> int:
    """Add the shapes that the table derives and that are still unknown; returns how many."""
    if opset_of(graph) < MIN_OPSET:
        return 0
    found, table = 0, infer_symbolic_shapes(graph)
    for node in post_order(graph):
        source = node.inputs[0] if node.inputs else None
        for out in node.outputs:
            if out.type is None and source is not None and is_standard(node) and node.op_type == "GroupNormalization":
                out.type = source.type  # inference does not cover it
            if out.shape is None and isinstance(out.type, ir.TensorType) and (shape := table.shape(out)) is not None:
                out.shape = ir.Shape(axis.dimension for axis in shape)
                found += 1
    return found


def _infer(model: ir.Model) -> int:
    """Add what onnx.shape_inference finds; returns about how many values it knows more."""
    return _take(model, inferred(model))


def _take(model: ir.Model, copy: ir.Model | None) -> int:
    """Add what is known in a copy of the model; returns about how many values that concerns."""
    added = 0
    for graph, twin in zip(model.graphs(), copy.graphs(), strict=True) if copy is not None else ():
        outermost = graph is model.graph
        own, known = (_values(each, outermost=outermost) for each in (graph, twin))
        added += sum(_add(value, known[name]) for name, value in own.items() if name in known)
    return added


def _values(graph: ir.Graph, *, outermost: bool) -> dict[str, ir.Value]:
    """Results of nodes and inputs of subgraphs, by name; the types of the model's own inputs are given."""
    made = (out for node in graph for out in node.outputs)
    return {value.name: value for value in (*(() if outermost else graph.inputs), *made) if value.name}


def _add(value: ir.Value, other: ir.Value) -> bool:
    """Add what is known about `other` to `value`; returns whether anything was new."""
    before = value.type, value.shape
    value.type = value.type or other.type
    dims = [_dim(None, new) for new in other.shape] if other.shape is not None else None
    if value.shape is None and dims is not None:
        value.shape = ir.Shape(dims)
    elif value.shape is not None and dims is not None and len(value.shape) == len(dims):
        named = value.is_graph_output()  # callers know its axes by these names
        value.shape = ir.Shape(_dim(own, new, named=named) for own, new in zip(value.shape, dims, strict=True))
    return before != (value.type, value.shape)


def _dim(own: int | ir.SymbolicDim | None, new: int | ir.SymbolicDim, *, named: bool = False) -> int | ir.SymbolicDim:
    """A number tells more than a name, and a name more than nothing; inference says -1 for an unknown length."""
    new = ir.SymbolicDim(None) if isinstance(new, int) and new < 0 else new
    if own is None or (isinstance(own, ir.SymbolicDim) and own.value is None):
        return new
    return new if isinstance(own, ir.SymbolicDim) and isinstance(new, int) and not named else own
