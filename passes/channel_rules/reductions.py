"""Reductions: a sum can drop zeros; a mean or a maximum over fewer channels would differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.rule import AgreeRule, Rule, keep_all, value_of
from cpcompile.passes.channels import Channels, Zeros
from cpcompile.passes.symbolic_shapes import axes_left


def _agree_reduce(sums: bool) -> AgreeRule:
    """Remaining axes are coupled; reduced ones lose zeros if `sums`, and nothing otherwise."""

    def agree(channels: Channels, node: ir.Node) -> None:
        value, out = value_of(node, 0), node.outputs[0]
        shape, out_shape = channels.shape(value), channels.shape(out)
        through = axes_left(channels.table, node)
        if shape is None or out_shape is None or through is None or len(out_shape) <= max(through.values(), default=-1):
            keep_all(channels, node, "its axes are unknown")
            return
        for axis in range(len(shape)):
            if axis in through:
                channels.couple([(value, axis), (out, through[axis])], node)
            elif sums:
                channels.couple([(value, axis)], node, limit=channels.zero(value).axes[axis])
            else:
                channels.keep(value, node, "it reduces over this axis", axes=[axis])

    return agree


def _zeros_reduce(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    """The sum and the mean of zeros are 0 (but an empty product is 1)."""
    through, out = axes_left(channels.table, node), channels.shape(node.outputs[0])
    if through is None or out is None or len(out) <= max(through.values(), default=-1):
        return None
    zeros = channels.zero(value_of(node, 0))
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    for axis, at in through.items():
        masks[at] = zeros.axes[axis]
    return [Zeros.of(masks, everything=zeros.everything)]


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(
            ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"), Rule(_agree_reduce(sums=True), _zeros_reduce)
        ),
        **dict.fromkeys(("ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"), Rule(_agree_reduce(sums=False))),
        "ReduceMean": Rule(_agree_reduce(sums=False), _zeros_reduce),
    }
)
