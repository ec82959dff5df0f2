"""Fold the scales that gates have learned into the weights beside them.

    (x * g) @ W  =  x @ (diag(g) W)        into the next weight, preferred
    (x @ W) * g  =  x @ (W diag(g))        into the weight before, with its bias

through Reshape and Transpose, as long as the scales are known to lie on the axis that the weight contracts or makes,
nothing else reads the weight, and nothing else changes values on the way. This saves one multiplication of every
activation. Products are rounded in another order, so results agree up to rounding (about 1e-6 of the largest value in
float32), not bit by bit.

This is for engines that share no weights, and for `opt`: a folded weight differs between contexts, which can no longer
share it. It keeps its name, and `Folding.folded` says what went into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpcompile.core.reshape import match_axes
from cpcompile.passes.axes import Axis, size_of
from cpcompile.passes.clean_up import replace_value
from cpcompile.passes.nodes import constant_of, permutation
from cpcompile.passes.operators import is_standard
from cpcompile.passes.opset import MinOpsetPass
from cpcompile.passes.scaled_weights import MAKERS, READERS, Array, Scales
from cpcompile.passes.shape_rules import infer_symbolic_shapes
from cpcompile.passes.symbolic_shapes import ShapeTable


@dataclass
class Folding(ir.passes.PassResult):
    """The products by a constant that were folded, and those that stay.

    `folded`: pairs of a changed initializer and the gate that went into it; `refused`: the products that stay, by
    the name of their result, each with the reason.
    """

    folded: tuple[tuple[str, str], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class FoldGates(MinOpsetPass):
    """Multiply weights by the constant vectors that scale what they read or make."""

    def call(self, model: ir.Model) -> Folding:
        """Edit `model`; `modified` counts folded gates."""
        graph = model.graph
        table = infer_symbolic_shapes(graph)
        folded: list[tuple[str, str]] = []
        refused: dict[str, str] = {}
        before = -1
        while before < len(folded):  # a gate that goes may have stood between another one and its weight
            before = len(folded)
            refused.clear()
            for node in reversed(list(graph)):
                if (found := _operands(table, node)) is None:
                    continue
                value, gate = found
                scales = _targets(table, node.outputs[0], value, gate)
                if isinstance(scales, str):
                    refused[node.outputs[0].name or ""] = scales
                    continue
                for weight, factors in scales.items():
                    _scale(weight, factors)
                    folded.append((weight.name or "", gate.name or ""))
                replace_value(value, node.outputs[0])
                graph.remove(node, safe=True)
                if not gate.uses() and not gate.is_graph_output():
                    graph.initializers.pop(gate.name or "")
        return Folding(model, bool(folded), tuple(folded), tuple(refused.items()))


def _operands(table: ShapeTable, node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The value and the constant of a product with the shape of the value; the constant has at most one axis."""
    if node.op_type != "Mul" or not is_standard(node):
        return None
    for value, gate in (node.inputs, node.inputs[::-1]):
        if value is None or gate is None or not gate.is_initializer() or constant_of(value) is not None:
            continue
        tensor, shape = constant_of(gate), table.shape(value)
        if tensor is None or not tensor.dtype.is_floating_point() or shape is None:
            continue
        lengths = tensor.shape.numpy()
        axes = shape[max(len(shape) - len(lengths), 0) :]
        longer = [axis for axis, length in enumerate(lengths) if length != 1]
        if len(axes) == len(lengths) and len(longer) <= 1 and all(axes[i] == Axis((), lengths[i]) for i in longer):
            return value, gate
    return None


def _targets(table: ShapeTable, out: ir.Value, value: ir.Value, gate: ir.Value) -> Scales | str:
    """What to scale instead of multiplying `value` by `gate`; or why that is not possible."""
    tensor, shape = constant_of(gate), table.shape(value)
    assert tensor is not None and shape is not None
    factors = tensor.numpy()
    factors = factors.reshape((1,) * (len(shape) - factors.ndim) + factors.shape)
    after = _ahead(table, out, factors)
    scales = _behind(table, value, factors) if isinstance(after, str) else after
    return f"after it, {after}; before it, {scales}" if isinstance(scales, str) else scales


def _ahead(table: ShapeTable, value: ir.Value, factors: Array) -> Scales | str:
    """The weight that contracts the scaled axis of `value`."""
    while True:
        if value.is_graph_output():
            return "it is an output of the model"
        if len(value.uses()) != 1:
            return f"{len(value.uses())} nodes read it"
        ((node, index),) = value.uses()
        if is_standard(node) and node.op_type in READERS:
            return READERS[node.op_type](node, index, factors)
        moved = _moved(table, node, factors, back=False) if index == 0 else None
        if moved is None:
            return f"{node.op_type} reads it"
        value, factors = node.outputs[0], moved


def _behind(table: ShapeTable, value: ir.Value, factors: Array) -> Scales | str:
    """The weight that makes the scaled axis of `value`."""
    while True:
        node = value.producer()
        if node is None:
            return "it is an input of the model"
        if value.is_graph_output() or len(value.uses()) != 1:
            return "something else reads it"
        if is_standard(node) and node.op_type in MAKERS:
            return MAKERS[node.op_type](node, factors)
        source = node.inputs[0] if node.inputs else None
        moved = _moved(table, node, factors, back=True)
        if moved is None or source is None:
            return f"{node.op_type} makes it"
        value, factors = source, moved


def _moved(table: ShapeTable, node: ir.Node, factors: Array, *, back: bool) -> Array | None:
    """The factors on the other side of a Transpose or Reshape; None for another node, or if axes are mixed."""
    if not is_standard(node) or node.op_type not in ("Transpose", "Reshape"):
        return None
    if node.op_type == "Transpose":
        order = permutation(node, factors.ndim)
        return factors.transpose(np.argsort(order) if back else order)
    shapes = table.shape(node.inputs[0]), table.shape(node.outputs[0])
    source, target = reversed(shapes) if back else shapes
    groups = match_axes(source, target, size_of) if source is not None and target is not None else None
    if source is None or target is None or groups is None:
        return None
    wide, result = [1] * len(source), [1] * len(target)
    for group in groups:
        if any(factors.shape[axis] > 1 for axis in group.first):
            if not all(axis.is_static for axis in (*source[_slice(group.first)], *target[_slice(group.second)])):
                return None
            wide[_slice(group.first)] = [axis.n for axis in source[_slice(group.first)]]
            result[_slice(group.second)] = [axis.n for axis in target[_slice(group.second)]]
    return np.broadcast_to(factors, wide).reshape(result)


def _slice(axes: range) -> slice:
    return slice(axes.start, axes.stop)


def _scale(weight: ir.Value, factors: Array) -> None:
    """Replace the tensor by its product with `factors`, which is made only when it is read."""
    tensor = weight.const_value
    assert tensor is not None
    weight.const_value = ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy() * factors, name=weight.name),
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=weight.name,
    )
