"""Pad: axes without padding keep their channels; a constant around an axis adds channels to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.rule import Rule, keep_all, value_of
from cpcompile.passes.channels import Channels, Zeros
from cpcompile.passes.nodes import constant_of
from cpcompile.passes.shape_inputs import set_integers
from cpcompile.passes.symbolic_shapes import axes_of, padding_of


def _is_constant(node: ir.Node) -> bool:
    mode = node.attributes.get("mode")
    return mode is None or mode.as_string() == "constant"


def _agree(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    shape, padding = channels.shape(value), padding_of(channels.table, node)
    if shape is None or channels.shape(out) is None or padding is None:
        keep_all(channels, node, "its padding is not constant")
        return
    for axis, (before, after) in enumerate(padding):
        if not (before or after):
            channels.couple([(value, axis), (out, axis)], node)
        elif not _is_constant(node) or min(before, after) < 0 or shape[axis].outer:
            for tensor in (value, out):
                channels.keep(tensor, node, "it crops this axis, or pads it with more than a constant", axes=[axis])
        else:
            inside = slice(before, before + shape[axis].n)
            mask, reasons = channels.cut(out, axis).copy(), channels.reasons((out, axis)).copy()
            lost = mask[inside] & ~channels.cut(value, axis)
            reasons[inside][lost] = channels.reasons((value, axis))[lost]
            mask[inside] &= ~lost
            channels.shrink((out, axis), mask, reasons)
            channels.shrink((value, axis), mask[inside], reasons[inside])


def _zeros(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    """Padding with zeros adds zeros; padding with existing elements adds zeros only if all of them are."""
    value, padding = value_of(node, 0), padding_of(channels.table, node)
    shape = channels.shape(value)
    if shape is None or padding is None or any(min(pads) < 0 for pads in padding):
        return None
    given = node.inputs[2] if len(node.inputs) > 2 else None
    number = constant_of(given) if given is not None else None
    if _is_constant(node) and given is not None and (number is None or number.numpy().any()):
        return None
    zeros = channels.zero(value)
    masks = []
    for mask, axis, (before, after) in zip(zeros.axes, shape, padding, strict=True):
        if not (before or after):
            masks.append(mask)
        elif axis.outer:
            masks.append(np.zeros(1, dtype=np.bool_))
        elif _is_constant(node):
            masks.append(np.pad(mask, (before, after), constant_values=True))
        else:
            masks.append(np.full(mask.size + before + after, zeros.everything))
    return [Zeros.of(masks, everything=zeros.everything)]


def _rewrite(channels: Channels, node: ir.Node) -> None:
    value, out, padding = value_of(node, 0), node.outputs[0], padding_of(channels.table, node)
    shape = channels.shape(value)
    if padding is None or shape is None:
        return
    left = list(padding)
    for axis, (before, after) in enumerate(padding):
        if (before or after) and (gone := channels.cut(out, axis)).any():
            left[axis] = (before - int(gone[:before].sum()), after - int(gone[gone.size - after :].sum()))
    if left != padding:
        given = axes_of(channels.table, node, len(shape), index=3) or []
        set_integers(node, 1, [left[axis][side] for side in (0, 1) for axis in given])


RULES: Mapping[str, Rule] = MappingProxyType({"Pad": Rule(_agree, _zeros, _rewrite)})
