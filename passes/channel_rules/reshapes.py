"""Operators that move, regroup or repeat whole axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.core.reshape import match_axes
from cpcompile.passes.axes import ONE, Shape, size_of
from cpcompile.passes.channel_rules.elementwise import first_zero
from cpcompile.passes.channel_rules.rule import Rule, keep_all, remaining, value_of
from cpcompile.passes.channels import Channels, Zeros, from_grid, grid_shape, to_grid
from cpcompile.passes.nodes import permutation
from cpcompile.passes.shape_inputs import plan_target_shape, set_integers, set_target_shape

_REGROUPED = "it regroups channels of which some have to stay"


def _agree_transpose(channels: Channels, node: ir.Node) -> None:
    shape = channels.shape(node.inputs[0])
    if shape is None:
        keep_all(channels, node, "its shape is unknown")
        return
    for at, axis in enumerate(permutation(node, len(shape))):
        channels.couple([(value_of(node, 0), axis), (node.outputs[0], at)], node)


def _zeros_transpose(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value = value_of(node, 0)
    shape = channels.shape(value)
    if shape is None:
        return None
    zeros = channels.zero(value)
    return [Zeros(tuple(zeros.axes[axis] for axis in permutation(node, len(shape))), zeros.everything)]


def _agree_reshape(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    first, second = channels.shape(value), channels.shape(out)
    groups = match_axes(first, second, size_of) if first is not None and second is not None else None
    if first is None or second is None or groups is None:
        keep_all(channels, node, "its target shape is unknown")
        return
    if node.op_type == "Reshape" and _cannot_rewrite(channels, node, first, second):
        return
    for group in groups:
        ours, theirs = _group_grids(first, second, group.first, group.second)
        if ours is None or theirs is None:
            for tensor, axes in ((value, group.first), (out, group.second)):
                channels.keep(tensor, node, "it mixes dynamic and static axes", axes=axes)
            continue
        common = to_grid([channels.cut(value, a) for a in group.first], ours)
        common &= to_grid([channels.cut(out, a) for a in group.second], theirs)
        for tensor, axes, shape in ((value, group.first, ours), (out, group.second, theirs)):
            for axis, mask in zip(axes, from_grid(common, shape), strict=True):
                channels.couple([(tensor, axis)], node, limit=mask, why=_REGROUPED)


def _group_grids(
    first: Shape, second: Shape, ours: range, theirs: range
) -> tuple[tuple[int, ...], tuple[int, ...]] | tuple[None, None]:
    left, right = grid_shape(first[ours.start : ours.stop]), grid_shape(second[theirs.start : theirs.stop])
    if left is None or right is None or np.prod(left, dtype=int) != np.prod(right, dtype=int):
        return None, None
    return left, right


def _zeros_reshape(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value = value_of(node, 0)
    first, second = channels.shape(value), channels.shape(node.outputs[0])
    groups = match_axes(first, second, size_of) if first is not None and second is not None else None
    if first is None or second is None or groups is None:
        return None
    zeros = channels.zero(value)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in second]
    for group in groups:
        ours, theirs = _group_grids(first, second, group.first, group.second)
        if ours is not None and theirs is not None:
            grid = to_grid([zeros.axes[a] for a in group.first], ours)
            for axis, mask in zip(group.second, from_grid(grid, theirs), strict=True):
                masks[axis] = mask
    return [Zeros.of(masks, everything=zeros.everything)]


def _cannot_rewrite(channels: Channels, node: ir.Node, source: Shape, target: Shape) -> bool:
    """Keep all channels of a node whose target shape could not be rewritten; returns whether that is so."""
    if plan_target_shape(node, source, target, channels.table) is not None:
        return False
    keep_all(channels, node, "the lengths of its dynamic axes cannot be read from any tensor")
    return True


def _rewrite_target_shape(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    if any(channels.cut(out, axis).any() for axis in range(len(channels.shape(out) or ()))):
        pieces = plan_target_shape(node, remaining(channels, value), remaining(channels, out), channels.table)
        assert pieces is not None, "agree has asked"
        set_target_shape(node, pieces, channels.table)


def _agree_expand(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    own, wide = channels.shape(value), channels.shape(out)
    if own is None or wide is None:
        keep_all(channels, node, "its target shape is unknown")
        return
    if _cannot_rewrite(channels, node, own, wide):
        return
    for axis, length in enumerate(own):
        at = axis + len(wide) - len(own)
        if length != ONE:
            channels.couple([(value, axis), (out, at)], node)


def _agree_unsqueeze(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    pairs = _through(channels, value, out)
    if pairs is None:
        keep_all(channels, node, "its axes cannot be matched")
        return
    for axis, at in pairs:
        channels.couple([(value, axis), (out, at)], node)


def _zeros_unsqueeze(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, out = value_of(node, 0), node.outputs[0]
    pairs, wide = _through(channels, value, out), channels.shape(out)
    if pairs is None or wide is None:
        return None
    zeros = channels.zero(value)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in wide]
    for axis, at in pairs:
        masks[at] = zeros.axes[axis]
    return [Zeros.of(masks, everything=zeros.everything)]


def _through(channels: Channels, value: ir.Value, out: ir.Value) -> list[tuple[int, int]] | None:
    """Axes other than those of length 1, in order: Squeeze and Unsqueeze add and drop only such."""
    own, other = channels.shape(value), channels.shape(out)
    if own is None or other is None:
        return None
    first = [i for i, axis in enumerate(own) if axis != ONE]
    second = [i for i, axis in enumerate(other) if axis != ONE]
    return list(zip(first, second, strict=True)) if len(first) == len(second) else None


def _rewrite_squeeze(channels: Channels, node: ir.Node) -> None:
    """Name the axes that a Squeeze drops by their length of 1, if one that it leaves now has this length, too."""
    value = value_of(node, 0)
    shape = channels.shape(value)
    if shape is None or (len(node.inputs) > 1 and node.inputs[1] is not None):
        return
    if sum(axis == ONE for axis in shape) == sum(axis == ONE for axis in remaining(channels, value)):
        return
    if dropped := [at for at, axis in enumerate(shape) if axis == ONE]:
        set_integers(node, 1, dropped)
    else:  # no axes would mean all of length 1
        node.op_type = "Identity"
        node.resize_inputs(1)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Transpose": Rule(_agree_transpose, _zeros_transpose),
        "Reshape": Rule(_agree_reshape, _zeros_reshape, _rewrite_target_shape),
        "Flatten": Rule(_agree_reshape, _zeros_reshape),
        "Expand": Rule(_agree_expand, first_zero, _rewrite_target_shape),
        "Unsqueeze": Rule(_agree_unsqueeze, _zeros_unsqueeze),
        "Squeeze": Rule(_agree_unsqueeze, _zeros_unsqueeze, _rewrite_squeeze),
    }
)
