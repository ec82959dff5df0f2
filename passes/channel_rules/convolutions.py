"""Convolutions and what follows them: data (batch, channels, ...), weight (out channels, channels / group, ...)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.rule import Rule, keep_all, value_of
from cpcompile.passes.channels import Cell, Channels, Zeros
from cpcompile.passes.symbolic_shapes import Axis, number_of


def _is_depthwise(channels: Channels, node: ir.Node) -> bool:
    """Whether every channel has a filter of its own."""
    data, weight, group = channels.shape(node.inputs[0]), channels.shape(node.inputs[1]), number_of(node, "group", 1)
    return bool(data and weight) and group > 1 and Axis((), group) == (data or ())[1] == (weight or ())[0]


def _agree_conv(channels: Channels, node: ir.Node) -> None:
    value, weight, out = value_of(node, 0), value_of(node, 1), node.outputs[0]
    a, b, c = (channels.shape(tensor) for tensor in (value, weight, out))
    if a is None or b is None or c is None or len({len(a), len(b), len(c)}) > 1:
        keep_all(channels, node, "its shapes are unknown")
        return
    for tensor in (value, weight, out):
        channels.keep(tensor, node, "it slides along this axis", axes=range(2, len(a)))
    channels.tie([(value, 0), (out, 0)], node)
    made: list[Cell] = [(out, 1), (weight, 0), *((bias, 0) for bias in node.inputs[2:3] if bias is not None)]
    if _is_depthwise(channels, node):
        channels.tie([(value, 1), *made], node)
    elif number_of(node, "group", 1) == 1 and a[1] == b[1]:
        channels.tie(made, node)
        contracted = channels.zero(value).axes[1] | channels.zero(weight).axes[1]
        channels.tie([(value, 1), (weight, 1)], node, limit=contracted)
    else:
        for tensor, axis in ((value, 1), (weight, 1), *made):
            channels.keep(tensor, node, "it has groups of several channels", axes=[axis])


def _zeros_conv(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, weight, out = value_of(node, 0), value_of(node, 1), channels.shape(node.outputs[0])
    if channels.shape(value) is None or channels.shape(weight) is None or out is None:
        return None
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    masks[1] = channels.zero(weight).axes[0].copy()
    if _is_depthwise(channels, node):
        masks[1] |= channels.zero(value).axes[1]
    for bias in node.inputs[2:3]:
        if bias is not None:
            masks[1] &= channels.zero(bias).axes[0] if channels.shape(bias) is not None else False
    return [Zeros.of(masks)]


def _rewrite_conv(channels: Channels, node: ir.Node) -> None:
    if _is_depthwise(channels, node):
        node.attributes["group"] = ir.AttrInt64("group", int((~channels.cut(node.outputs[0], 1)).sum()))


def _agree_batch_norm(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    shape = channels.shape(value)
    if shape is None or channels.shape(out) is None or len(node.outputs) > 1:
        keep_all(channels, node, "it is training, or its shapes are unknown")
        return
    for axis in range(len(shape)):
        statistics: list[Cell] = [(value_of(node, i), 0) for i in range(1, 5)] if axis == 1 else []
        channels.tie([(value, axis), (out, axis), *statistics], node)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Conv": Rule(_agree_conv, _zeros_conv, _rewrite_conv, data=3),
        "BatchNormalization": Rule(_agree_batch_norm, data=5),
    }
)
