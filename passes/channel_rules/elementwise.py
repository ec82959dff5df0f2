"""Elementwise operators: axes are aligned from the right, axes of length 1 broadcast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.axes import ONE
from cpcompile.passes.channel_rules.rule import AgreeRule, Rule, ZerosRule, keep_all
from cpcompile.passes.channels import Cell, Channels, Mask, Zeros
from cpcompile.passes.nodes import constant_of
from cpcompile.passes.operators import NOT_ZERO_AT_ZERO, ZERO_AT_ZERO


def _aligned(channels: Channels, node: ir.Node, inputs: Sequence[ir.Value]) -> list[list[Cell]] | None:
    """Per axis of the output the cells that are aligned with it; None if shapes are unknown."""
    out = channels.shape(node.outputs[0])
    if out is None:
        return None
    columns: list[list[Cell]] = [[(node.outputs[0], axis)] for axis in range(len(out))]
    for value in inputs:
        shape = channels.shape(value)
        if shape is None or len(shape) > len(out):
            return None
        for axis, own in enumerate(shape):
            at = axis + len(out) - len(shape)
            if own.n == out[at].n and own.same_length(out[at]):
                columns[at].append((value, axis))
            elif own != ONE:
                return None
    return columns


def _couple_aligned(which: slice) -> AgreeRule:
    """The axes of the output and of the inputs `which` lose the same channels."""

    def agree(channels: Channels, node: ir.Node) -> None:
        columns = _aligned(channels, node, [value for value in node.inputs[which] if value is not None])
        if columns is None:
            keep_all(channels, node, "its shapes do not show which channels belong together")
            return
        for cells in columns:
            channels.couple(cells, node)

    return agree


def combined(combine: Callable[[Sequence[Mask]], Mask], which: slice) -> ZerosRule:
    """Zeros of an elementwise result from those of the inputs `which`."""

    def zeros(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
        inputs = [value for value in node.inputs[which] if value is not None]
        columns = _aligned(channels, node, inputs)
        out = channels.shape(node.outputs[0])
        if columns is None or out is None:
            return None
        known = {value: channels.zero(value) for value in inputs}
        masks = []
        for axis, cells in enumerate(columns):
            at_axis = {value: own for value, own in cells if value in known}
            masks.append(
                combine(
                    [
                        known[value].axes[at_axis[value]]
                        if value in at_axis
                        else np.full(out[axis].n, known[value].everything)
                        for value in inputs
                    ]
                )
            )
        everything = bool(combine([np.array([known[value].everything]) for value in inputs])[0])
        return [Zeros.of(masks, everything=everything)]

    return zeros


_all_zero = combined(np.logical_and.reduce, slice(None))
_any_zero = combined(np.logical_or.reduce, slice(None))
first_zero = combined(np.logical_and.reduce, slice(1))
_branches_zero = combined(np.logical_and.reduce, slice(1, 3))
_agree_elementwise = _couple_aligned(slice(None))
_agree_first = _couple_aligned(slice(1))


def _zeros_clip(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    """0 stays 0 if it lies between the bounds."""
    low, high = (constant_of(bound) if bound is not None else None for bound in (*node.inputs[1:3], None, None)[:2])
    for given, tensor, fits in zip(node.inputs[1:3], (low, high), (np.less_equal, np.greater_equal), strict=False):
        if given is not None and (tensor is None or not fits(tensor.numpy(), 0).all()):
            return None
    return first_zero(channels, node)


_UNARY_ZERO = Rule(_agree_elementwise, first_zero)
_UNARY = Rule(_agree_elementwise)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(ZERO_AT_ZERO, _UNARY_ZERO),
        **dict.fromkeys(NOT_ZERO_AT_ZERO, _UNARY),
        **dict.fromkeys(["Add", "Sub", "Sum", "Max", "Min", "Mean"], Rule(_agree_elementwise, _all_zero, data=2**10)),
        **dict.fromkeys(("Mul", "And"), Rule(_agree_elementwise, _any_zero, data=2)),
        **dict.fromkeys(("Div", "Mod", "PRelu"), Rule(_agree_elementwise, first_zero, data=2)),
        "CastLike": Rule(_agree_first, first_zero),
        "Clip": Rule(_agree_first, _zeros_clip),
        **dict.fromkeys(
            ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Or", "Pow", "Xor"],
            Rule(_agree_elementwise, data=2),
        ),
        "Where": Rule(_agree_elementwise, _branches_zero, data=3),
    }
)
