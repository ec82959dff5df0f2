"""Matrix products: a contraction can drop what is zero on either side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.axes import ONE
from cpcompile.passes.channel_rules.rule import Rule, keep_all, value_of
from cpcompile.passes.channels import Cell, Channels, Zeros
from cpcompile.passes.nodes import int_attribute


def _agree_matmul(channels: Channels, node: ir.Node) -> None:
    first, second, out = value_of(node, 0), value_of(node, 1), node.outputs[0]
    a, b, c = channels.shape(first), channels.shape(second), channels.shape(out)
    if not a or not b or c is None or a[-1] != b[max(len(b) - 2, 0)]:
        keep_all(channels, node, "its shapes do not show what it contracts")
        return
    # A vector has neither rows nor columns of its own, and the result lacks them.
    k, batch_axes = max(len(b) - 2, 0), len(c) - (len(a) > 1) - (len(b) > 1)
    for axis in range(batch_axes):
        cells: list[Cell] = [(out, axis)]
        for value, shape in ((first, a), (second, b)):
            at = axis - (batch_axes - max(len(shape) - 2, 0))
            if at >= 0 and shape[at] != ONE:
                cells.append((value, at))
        channels.couple(cells, node)
    if len(a) > 1:
        channels.couple([(first, len(a) - 2), (out, batch_axes)], node)
    if len(b) > 1:
        channels.couple([(second, len(b) - 1), (out, len(c) - 1)], node)
    contracted = channels.zero(first).axes[-1] | channels.zero(second).axes[k]
    channels.couple([(first, len(a) - 1), (second, k)], node, limit=contracted)


def _zeros_matmul(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    first, second, out = node.inputs[0], node.inputs[1], channels.shape(node.outputs[0])
    a, b = channels.shape(first), channels.shape(second)
    if first is None or second is None or a is None or b is None or out is None or min(len(a), len(b)) < 2:
        return None
    left, right = channels.zero(first), channels.zero(second)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    for zeros, contracted in ((left, len(a) - 1), (right, len(b) - 2)):
        for axis, mask in enumerate(zeros.axes):
            at = axis + len(out) - len(zeros.axes)
            if axis != contracted and mask.size == masks[at].size:
                masks[at] |= mask
    fits = left.axes[-1].shape == right.axes[-2].shape
    return [Zeros.of(masks, everything=fits and bool((left.axes[-1] | right.axes[-2]).all()))]


def _agree_gemm(channels: Channels, node: ir.Node) -> None:
    """alpha * A' B' + beta * C, transposed by transA and transB."""
    first, second, out = value_of(node, 0), value_of(node, 1), node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    a, b, c = channels.shape(first), channels.shape(second), channels.shape(bias)
    m, k = (1, 0) if int_attribute(node, "transA", 0) else (0, 1)
    k_second, n = (1, 0) if int_attribute(node, "transB", 0) else (0, 1)
    unknown = a is None or b is None or channels.shape(out) is None or (bias is not None and c is None)
    if a is None or b is None or unknown or a[k] != b[k_second]:
        keep_all(channels, node, "its shapes do not show what it contracts")
        return
    channels.couple([(first, m), (out, 0)], node)
    channels.couple([(second, n), (out, 1)], node)
    contracted = channels.zero(first).axes[k] | channels.zero(second).axes[k_second]
    channels.couple([(first, k), (second, k_second)], node, limit=contracted)
    for axis, length in enumerate(c or ()):
        if bias is not None and length != ONE:
            channels.couple([(bias, axis), (out, axis + 2 - len(c or ()))], node)


def _zeros_gemm(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None or channels.shape(first) is None or channels.shape(second) is None:
        return None
    rows = channels.zero(first).axes[1 if int_attribute(node, "transA", 0) else 0]
    columns = channels.zero(second).axes[0 if int_attribute(node, "transB", 0) else 1]
    everything = product_is_zero(channels, node)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        if (shape := channels.shape(bias)) is None:
            return None
        added = channels.zero(bias)
        everything = everything and added.everything
        rows = rows & added.everything
        columns = columns & (added.axes[-1] if shape and shape[-1].n == columns.size else added.everything)
    return [Zeros.of([rows, columns], everything=everything)]


def product_is_zero(channels: Channels, node: ir.Node) -> bool:
    """Whether a Gemm gives nothing but its bias: in each of its terms a factor is zero."""
    first, second = value_of(node, 0), value_of(node, 1)
    if channels.shape(first) is None or channels.shape(second) is None:
        return False
    left = channels.zero(first).axes[0 if int_attribute(node, "transA", 0) else 1]
    right = channels.zero(second).axes[1 if int_attribute(node, "transB", 0) else 0]
    return left.shape == right.shape and bool((left | right).all())


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "MatMul": Rule(_agree_matmul, _zeros_matmul, data=2),
        "Gemm": Rule(_agree_gemm, _zeros_gemm, data=3),
    }
)
