"""Operators that treat some axes as a whole and leave the others alone: softmax, norms, pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.elementwise import first_zero
from cpcompile.passes.channel_rules.rule import AgreeRule, Rule, ZerosRule, keep_all, value_of
from cpcompile.passes.channels import Channels, Zeros
from cpcompile.passes.nodes import int_attribute


def _whole_axes(which: Callable[[Channels, ir.Node, int], Sequence[int] | None], why: str) -> AgreeRule:
    """Axes keep their position and are coupled, except for those that the operator works along."""

    def agree(channels: Channels, node: ir.Node) -> None:
        shape = channels.shape(node.inputs[0])
        whole = which(channels, node, len(shape)) if shape is not None else None
        if shape is None or whole is None:
            keep_all(channels, node, "its axes are unknown")
            return
        for value in node.inputs[1:]:
            channels.keep(value, node, why)
        for axis in range(len(shape)):
            for out in node.outputs:
                if axis in whole:
                    channels.keep(out, node, why, axes=_existing(channels, out, axis))
                elif len(channels.shape(out) or ()) == len(shape):
                    channels.couple([(value_of(node, 0), axis), (out, axis)], node)
                else:
                    channels.keep(out, node, "its shape is unknown")
            if axis in whole:
                channels.keep(node.inputs[0], node, why, axes=[axis])

    return agree


def _zeros_beside(which: Callable[[Channels, ir.Node, int], Sequence[int] | None]) -> ZerosRule:
    """For operators that map zeros to zeros: zero slices stay zero, except on the axes that they work along."""

    def zeros(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
        shape, out = channels.shape(node.inputs[0]), channels.shape(node.outputs[0])
        whole = which(channels, node, len(shape)) if shape is not None else None
        if whole is None or out is None:
            return None
        known = channels.zero(value_of(node, 0))
        masks = [np.zeros_like(mask) if axis in whole else mask for axis, mask in enumerate(known.axes)]
        return [
            Zeros.of([m if m.size == a.n else np.zeros(a.n, dtype=np.bool_) for m, a in zip(masks, out, strict=True)])
        ]

    return zeros


def _existing(channels: Channels, value: ir.Value, axis: int) -> list[int]:
    return [axis] if axis < len(channels.shape(value) or ()) else []


def _one_axis(default: int) -> Callable[[Channels, ir.Node, int], Sequence[int]]:
    return lambda _channels, node, rank: [int_attribute(node, "axis", default) % rank]


def _from_axis(_channels: Channels, node: ir.Node, rank: int) -> Sequence[int]:
    return range(int_attribute(node, "axis", -1) % rank, rank)


def _spatial(_channels: Channels, node: ir.Node, rank: int) -> Sequence[int]:
    return range(2, rank) if len(node.outputs) == 1 else range(rank)


def _last_two(_channels: Channels, _node: ir.Node, rank: int) -> Sequence[int]:
    return [rank - 2, rank - 1]


_OVER_AXIS = "it works along this axis"
_OTHER_NORM = "a norm over fewer channels gives other values"


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), Rule(_whole_axes(_one_axis(-1), _OVER_AXIS))),
        "LayerNormalization": Rule(_whole_axes(_from_axis, _OTHER_NORM), data=3),
        "RMSNormalization": Rule(_whole_axes(_from_axis, _OTHER_NORM), _zeros_beside(_from_axis), data=2),
        "Trilu": Rule(_whole_axes(_last_two, _OVER_AXIS), first_zero),
        **dict.fromkeys(
            ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"),
            Rule(_whole_axes(_spatial, "it slides along this axis"), _zeros_beside(_spatial)),
        ),
    }
)
