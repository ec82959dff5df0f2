"""Turn scales of what a contraction reads or makes into scales of its weights.

(x * g) @ W  =  x @ (diag(g) W)        READERS: the axis of the weight that is contracted
(x @ W) * g  =  x @ (W diag(g))        MAKERS: the axis that it makes, and that of the bias
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.nodes import constant_of, int_attribute

Array = npt.NDArray[np.generic]
Scales = Mapping[ir.Value, Array]
"""Initializers, each with factors that broadcast to its shape."""


def _on_axis(weight: ir.Value | None, axis: int, factors: Array, scaled: int) -> Scales | str:
    """The factors on axis `scaled` of an activation as factors on `axis` of `weight`."""
    rank = _rank(weight)
    if weight is None or axis >= rank or factors.size != factors.shape[scaled]:
        return "the weight has no such axis"
    return _scales(weight, factors.reshape([-1 if a == axis else 1 for a in range(rank)]))


def _scales(weight: ir.Value, factors: Array) -> Scales | str:
    """The factors for `weight`, if it is a constant that nothing else reads."""
    if not weight.is_initializer() or constant_of(weight) is None:
        return f"{weight.name} is not constant"
    if len(weight.uses()) != 1 or weight.is_graph_output():
        return f"{weight.name} has other uses"
    return {weight: factors}


def _rank(value: ir.Value | None) -> int:
    return value.shape.rank() if value is not None and value.shape is not None else 0


def _read_by_matmul(node: ir.Node, index: int, factors: Array) -> Scales | str:
    weight = node.inputs[1 - index]
    if index == 0:
        return _on_axis(weight, max(_rank(weight) - 2, 0), factors, -1)
    return _on_axis(weight, max(_rank(weight) - 1, 0), factors, max(factors.ndim - 2, 0))


def _read_by_gemm(node: ir.Node, index: int, factors: Array) -> Scales | str:
    """alpha * A' B' + beta * C, transposed by transA and transB."""
    if index == 2:
        return "Gemm adds it"
    contracted = [0 if int_attribute(node, "transA", 0) else 1, 1 if int_attribute(node, "transB", 0) else 0]
    return _on_axis(node.inputs[1 - index], contracted[1 - index], factors, contracted[index])


def _read_by_conv(node: ir.Node, index: int, factors: Array) -> Scales | str:
    """Kernels (out channels, channels / group, ...): those of a group read the channels of their group."""
    kernels, groups = node.inputs[1], int_attribute(node, "group", 1)
    if index != 0 or kernels is None:
        return "Conv does not read it as data"
    if groups == 1 or factors.size == 1:
        return _on_axis(kernels, 1, factors, 1)
    if factors.size != factors.shape[1] or kernels.shape is None or not kernels.shape.is_static():
        return "the weight has no such axis"
    out, inner, *window = kernels.shape.numpy()
    rows = factors.reshape(groups, inner).repeat(out // groups, axis=0)
    return _scales(kernels, rows.reshape(out, inner, *(1 for _ in window)))


def _made_by_matmul(node: ir.Node, factors: Array) -> Scales | str:
    """The last axis is the last one of the second matrix, the one before it the rows of the first."""
    first, second = _rank(node.inputs[0]), _rank(node.inputs[1])
    if min(first, second) < 2:
        return "MatMul multiplies a vector"
    columns = _on_axis(node.inputs[1], second - 1, factors, -1)
    return _on_axis(node.inputs[0], first - 2, factors, -2) if isinstance(columns, str) else columns


def _made_by_gemm(node: ir.Node, factors: Array) -> Scales | str:
    made = _on_axis(node.inputs[1], 0 if int_attribute(node, "transB", 0) else 1, factors, 1)
    return _with_bias(node, made, factors, 1)


def _made_by_conv(node: ir.Node, factors: Array) -> Scales | str:
    return _with_bias(node, _on_axis(node.inputs[1], 0, factors, 1), factors, 1)


def _with_bias(node: ir.Node, made: Scales | str, factors: Array, scaled: int) -> Scales | str:
    """What is added to a scaled product is scaled too."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or isinstance(made, str):
        return made
    if bias.shape is None or not bias.shape.rank() or factors.size not in (1, bias.shape[-1]):
        return "the bias has no such axis"
    added = _on_axis(bias, _rank(bias) - 1, factors, scaled)
    return added if isinstance(added, str) else {**made, **added}


READERS: Mapping[str, Callable[[ir.Node, int, Array], Scales | str]] = MappingProxyType(
    {"MatMul": _read_by_matmul, "Gemm": _read_by_gemm, "Conv": _read_by_conv}
)
"""Operator -> what to scale instead of an input of the contraction, or why that is not possible."""
MAKERS: Mapping[str, Callable[[ir.Node, Array], Scales | str]] = MappingProxyType(
    {"MatMul": _made_by_matmul, "Gemm": _made_by_gemm, "Conv": _made_by_conv}
)
"""Operator -> what to scale instead of the result of the contraction, or why that is not possible."""
