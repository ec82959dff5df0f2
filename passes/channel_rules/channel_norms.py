"""Norms of data (batch, channels, ...) with statistics per channel, or per group of channels.

BatchNormalization and InstanceNormalization treat every channel by itself. GroupNormalization takes the mean over a
group: groups go as a whole. (Its deprecated form of opset 18, with a scale per group, is left alone.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.rule import Rule, keep_all, value_of
from cpcompile.passes.channels import Cell, Channels, Zeros
from cpcompile.passes.nodes import int_attribute


def _agree_batch_norm(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    shape = channels.shape(value)
    if shape is None or channels.shape(out) is None or len(node.outputs) > 1:
        keep_all(channels, node, "it is training, or its shapes are unknown")
        return
    for axis in range(len(shape)):
        statistics: list[Cell] = [(value_of(node, i), 0) for i in range(1, 5)] if axis == 1 else []
        channels.couple([(value, axis), (out, axis), *statistics], node)


def _agree(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    shape = channels.shape(value)
    vectors: list[Cell] = [(value_of(node, 1), 0), (value_of(node, 2), 0)]
    if shape is None or channels.shape(out) is None or any(channels.shape(v) is None for v, _ in vectors):
        keep_all(channels, node, "its shapes are unknown")
        return
    channels.couple([(value, 0), (out, 0)], node)
    channels.couple([(value, 1), (out, 1), *vectors], node)
    for tensor in (value, out):
        channels.keep(tensor, node, "it takes the mean over this axis", axes=range(2, len(shape)))
    if node.op_type == "GroupNormalization":
        cells = [(value, 1), (out, 1), *vectors]
        channels.couple_groups(cells, int_attribute(node, "num_groups", 1), node, "its group takes the mean over it")


def _zeros(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    """A channel with bias 0 is zero if its scale is 0, or if its whole group was zero."""
    value, scale, bias = (value_of(node, index) for index in range(3))
    shape, vectors = channels.shape(value), (channels.shape(scale), channels.shape(bias))
    if shape is None or not shape[1].is_static or any(vector != shape[1:2] for vector in vectors):
        return None
    groups = int_attribute(node, "num_groups", shape[1].n)
    zero = channels.zero(value).axes[1]
    whole = np.repeat(zero.reshape(groups, -1).all(axis=1), zero.size // groups)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in shape]
    masks[1] = channels.zero(bias).axes[0] & (channels.zero(scale).axes[0] | whole)
    return [Zeros.of(masks)]


def _rewrite(channels: Channels, node: ir.Node) -> None:
    if node.op_type == "GroupNormalization":
        groups, cut = int_attribute(node, "num_groups", 1), channels.cut(value_of(node, 0), 1)
        if cut.any():
            left = int((~cut).sum()) * groups // cut.size
            node.attributes["num_groups"] = ir.AttrInt64("num_groups", left)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "BatchNormalization": Rule(_agree_batch_norm, data=5),
        **dict.fromkeys(("InstanceNormalization", "GroupNormalization"), Rule(_agree, _zeros, _rewrite, data=3)),
    }
)
