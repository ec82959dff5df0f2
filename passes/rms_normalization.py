"""Normalise by the root mean square in one node, in place of seven.

weight * (x * Reciprocal(Sqrt(ReduceMean(Pow(x, 2)) + epsilon)))  ->  RMSNormalization(x, weight)

Source: ONNX operator RMSNormalization-23; arXiv 1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpcompile.files.onnx_file import opset_of
from cpcompile.passes.clean_up import CleanUp, replace_value
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import both_orders, constant_integer, constant_of, int_attribute, known_shape, made_by

OPSET = 23
"""The first with RMSNormalization."""


@dataclass(frozen=True)
class _Norm:
    """`out` is `x`, normalised over its last axis and multiplied by `weight`."""

    x: ir.Value
    weight: ir.Value
    epsilon: float
    out: ir.Value


@dataclass(frozen=True)
class RmsNormalization(GraphPass):
    """Use the operator of the standard; models in older opsets stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`."""
        nodes = list(model.graph) if opset_of(model.graph) >= OPSET else []
        norms = [norm for node in nodes if (norm := _norm(node)) is not None]
        for norm in norms:
            old = norm.out.producer()
            assert old is not None
            attributes = {"axis": -1, "epsilon": norm.epsilon}
            new = ir.node("RMSNormalization", [norm.x, norm.weight], attributes, name=old.name)
            new.metadata_props.update(old.metadata_props)
            model.graph.insert_before(old, new)
            out = new.outputs[0]
            out.name, out.type, out.shape = f"{norm.out.name}.norm", norm.out.type, norm.out.shape
            replace_value(out, norm.out)
        if norms:
            CleanUp(frozenset(model.graph.initializers))(model)
        return ir.passes.PassResult(model, bool(norms))


def _norm(node: ir.Node) -> _Norm | None:
    """The normalisation that ends with the product `node`."""
    for weight, normal in _operands(node.outputs[0], "Mul"):
        for x, scale in _operands(normal, "Mul"):
            epsilon = _epsilon(scale, x)
            shape = known_shape(x)
            fits = shape and known_shape(weight) == shape[-1:] and x.dtype == weight.dtype == ir.DataType.FLOAT
            if epsilon is not None and fits:
                return _Norm(x, weight, epsilon, node.outputs[0])
    return None


def _operands(value: ir.Value | None, operator: str) -> tuple[tuple[ir.Value, ir.Value], ...]:
    """Both operands of the Mul or Add that makes `value`, in either order; nothing if another node does."""
    node = made_by(value, operator)
    return () if node is None else both_orders(node)


def _epsilon(scale: ir.Value, x: ir.Value) -> float | None:
    """What is added, if `scale` is 1 / sqrt(mean of the squares of `x` over its last axis + epsilon)."""
    inverse = made_by(scale, "Reciprocal")
    root = made_by(inverse.inputs[0], "Sqrt") if inverse is not None else None
    for mean, epsilon in _operands(root.inputs[0], "Add") if root is not None else ():
        if _is_mean_square(mean, x) and (number := _number(epsilon)) is not None:
            return number
    return None


def _is_mean_square(value: ir.Value | None, x: ir.Value) -> bool:
    mean = made_by(value, "ReduceMean")
    if mean is None or len(mean.inputs) != 2 or int_attribute(mean, "keepdims", 1) != 1:
        return False
    square, axes = made_by(mean.inputs[0], "Pow"), mean.inputs[1]
    of_x = square is not None and square.inputs[0] is x and _number(square.inputs[1]) == 2
    return of_x and constant_integer(axes) in (-1, len(known_shape(x)) - 1)


def _number(value: ir.Value | None) -> float | None:
    """The one element of a constant."""
    tensor = None if value is None else constant_of(value)
    return float(np.asarray(tensor.numpy()).item()) if tensor is not None and tensor.size == 1 else None
