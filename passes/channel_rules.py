"""How every operator treats channels: one rule per operator family, all in the table RULES at the end.

A rule says three things of a node:

    zeros(channels, node)    which slices of its outputs are zero, given those of its inputs
    agree(channels, node)    which channels of inputs and outputs can only be cut together, or not at all
    rewrite(channels, node)  what else changes once they are cut: sizes, indices, shapes

Assumes finite values: 0 * x is 0. Operators: the ONNX standard, docs/Operators.md, opsets 13 to 24.
An operator without a rule keeps all its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.channels import Cell, Channels, Mask, Zeros, from_grid, grid_shape, match_axes, to_grid
from cpcompile.passes.shape_inputs import set_integers, set_target_shape
from cpcompile.passes.symbolic_shapes import ONE, Axis, Shape, axes_of, number_of, permutation

ZerosRule = Callable[[Channels, ir.Node], Sequence[Zeros] | None]
AgreeRule = Callable[[Channels, ir.Node], None]
RewriteRule = Callable[[Channels, ir.Node], None]


def _nothing(_channels: Channels, _node: ir.Node) -> None:
    return None


@dataclass(frozen=True)
class Rule:
    """The behaviour of one operator; `data` of its inputs carry channels, the others are settings."""

    agree: AgreeRule
    zeros: ZerosRule = _nothing
    rewrite: RewriteRule = _nothing
    data: int = 1


def rule_of(node: ir.Node) -> Rule | None:
    """The rule of `node`; None for other domains, operators with sub-graphs, and what is not in the table."""
    if node.domain not in ("", "ai.onnx") or any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        return None
    return RULES.get(node.op_type)


# Elementwise operators: axes are aligned from the right, axes of length 1 stretch.


def _aligned(channels: Channels, node: ir.Node, inputs: Sequence[ir.Value]) -> list[list[Cell]] | None:
    """Per axis of the output the cells that run along with it; None if shapes are unknown."""
    out = channels.shape(node.outputs[0])
    if out is None:
        return None
    columns: list[list[Cell]] = [[(node.outputs[0], axis)] for axis in range(len(out))]
    for value in inputs:
        shape = channels.shape(value)
        if shape is None:
            return None
        for axis, own in enumerate(shape):
            at = axis + len(out) - len(shape)
            if own.n == out[at].n and own.same_length(out[at]):
                columns[at].append((value, axis))
            elif own != ONE:
                return None
    return columns


def _agree_elementwise(channels: Channels, node: ir.Node) -> None:
    columns = _aligned(channels, node, [value for value in node.inputs if value is not None])
    if columns is None:
        _keep_all(channels, node, "shapes do not tell which channels belong together")
        return
    for cells in columns:
        channels.tie(cells, node)


def _keep_all(channels: Channels, node: ir.Node, why: str) -> None:
    for value in (*node.inputs, *node.outputs):
        channels.keep(value, node, why)


def _combined(combine: Callable[[Sequence[Mask]], Mask], which: slice) -> ZerosRule:
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


_all_zero = _combined(np.logical_and.reduce, slice(None))
_any_zero = _combined(np.logical_or.reduce, slice(None))
_first_zero = _combined(np.logical_and.reduce, slice(1))
_branches_zero = _combined(np.logical_and.reduce, slice(1, 3))


# Operators that treat some axes as a whole and leave the others alone.


def _whole_axes(which: Callable[[Channels, ir.Node, int], Sequence[int] | None], why: str) -> AgreeRule:
    """Axes of the same number run through, but for those that the operator works along."""

    def agree(channels: Channels, node: ir.Node) -> None:
        shape = channels.shape(node.inputs[0])
        whole = which(channels, node, len(shape)) if shape is not None else None
        if shape is None or whole is None:
            _keep_all(channels, node, "its axes are unknown")
            return
        for value in node.inputs[1:]:
            channels.keep(value, node, why)
        for axis in range(len(shape)):
            for out in node.outputs:
                if axis in whole:
                    channels.keep(out, node, why, axes=_existing(channels, out, axis))
                elif len(channels.shape(out) or ()) == len(shape):
                    channels.tie([(_value(node, 0), axis), (out, axis)], node)
                else:
                    channels.keep(out, node, "its shape is unknown")
            if axis in whole:
                channels.keep(node.inputs[0], node, why, axes=[axis])

    return agree


def _existing(channels: Channels, value: ir.Value, axis: int) -> list[int]:
    return [axis] if axis < len(channels.shape(value) or ()) else []


def _value(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _one_axis(default: int) -> Callable[[Channels, ir.Node, int], Sequence[int]]:
    return lambda _channels, node, rank: [number_of(node, "axis", default) % rank]


def _from_axis(_channels: Channels, node: ir.Node, rank: int) -> Sequence[int]:
    return range(number_of(node, "axis", -1) % rank, rank)


def _last_two(_channels: Channels, _node: ir.Node, rank: int) -> Sequence[int]:
    return [rank - 2, rank - 1]


# Reductions.


def _agree_reduce(sums: bool) -> AgreeRule:
    """A sum can spare channels that are zero; a mean or a maximum over fewer channels would be another one."""

    def agree(channels: Channels, node: ir.Node) -> None:
        value, out = _value(node, 0), node.outputs[0]
        shape, out_shape = channels.shape(value), channels.shape(out)
        axes = axes_of(channels.table, node, len(shape)) if shape is not None else None
        if shape is None or out_shape is None or axes is None:
            _keep_all(channels, node, "its axes are unknown")
            return
        kept = iter(range(len(out_shape)))
        keeps_axes = bool(number_of(node, "keepdims", 1))
        for axis in range(len(shape)):
            at = next(kept) if axis not in axes or keeps_axes else None
            if axis not in axes:
                assert at is not None
                channels.tie([(value, axis), (out, at)], node)
            elif sums:
                channels.tie([(value, axis)], node, limit=channels.zero(value).axes[axis])
            else:
                channels.keep(value, node, "it reduces over this axis", axes=[axis])

    return agree


# Matrix products.


def _agree_matmul(channels: Channels, node: ir.Node) -> None:
    first, second, out = _value(node, 0), _value(node, 1), node.outputs[0]
    a, b, c = channels.shape(first), channels.shape(second), channels.shape(out)
    if a is None or b is None or c is None or min(len(a), len(b)) < 2 or a[-1] != b[-2]:
        _keep_all(channels, node, "its shapes do not tell what it contracts")
        return
    for axis in range(len(c) - 2):
        cells: list[Cell] = [(out, axis)]
        for value, shape in ((first, a), (second, b)):
            at = axis - (len(c) - len(shape))
            if at >= 0 and shape[at] != ONE:
                cells.append((value, at))
        if len({channels.cut(*cell).shape for cell in cells}) == 1:
            channels.tie(cells, node)
        else:
            for value, at in cells:
                channels.keep(value, node, "its batch axes cannot be told to fit", axes=[at])
    channels.tie([(first, len(a) - 2), (out, len(c) - 2)], node)
    channels.tie([(second, len(b) - 1), (out, len(c) - 1)], node)
    contracted = channels.zero(first).axes[-1] | channels.zero(second).axes[-2]
    channels.tie([(first, len(a) - 1), (second, len(b) - 2)], node, limit=contracted)


def _zeros_matmul(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    first, second, out = node.inputs[0], node.inputs[1], channels.shape(node.outputs[0])
    a, b = channels.shape(first), channels.shape(second)
    if first is None or second is None or a is None or b is None or out is None or min(len(a), len(b)) < 2:
        return None
    left, right = channels.zero(first), channels.zero(second)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    for zeros, shape in ((left, a), (right, b)):
        for axis in range(len(shape) - 2):
            at = axis + len(out) - len(shape)
            if shape[axis].n == out[at].n:
                masks[at] |= zeros.axes[axis]
    masks[-2] |= left.axes[-2]
    masks[-1] |= right.axes[-1]
    fits = left.axes[-1].shape == right.axes[-2].shape
    return [Zeros.of(masks, everything=fits and bool((left.axes[-1] | right.axes[-2]).all()))]


def _agree_gemm(channels: Channels, node: ir.Node) -> None:
    """alpha * A' B' + beta * C, transposed by transA and transB."""
    first, second, out = _value(node, 0), _value(node, 1), node.outputs[0]
    if channels.shape(first) is None or channels.shape(second) is None or channels.shape(out) is None:
        _keep_all(channels, node, "its shapes are unknown")
        return
    m, k = (1, 0) if number_of(node, "transA", 0) else (0, 1)
    k_second, n = (1, 0) if number_of(node, "transB", 0) else (0, 1)
    channels.tie([(first, m), (out, 0)], node)
    channels.tie([(second, n), (out, 1)], node)
    contracted = channels.zero(first).axes[k] | channels.zero(second).axes[k_second]
    channels.tie([(first, k), (second, k_second)], node, limit=contracted)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    shape = channels.shape(bias)
    for axis in range(len(shape or ())):
        at = axis + 2 - len(shape or ())
        if bias is not None and channels.cut(bias, axis).shape == channels.cut(out, at).shape:
            channels.tie([(bias, axis), (out, at)], node)


def _zeros_gemm(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None or channels.shape(first) is None or channels.shape(second) is None:
        return None
    m, k = (1, 0) if number_of(node, "transA", 0) else (0, 1)
    k_second, n = (1, 0) if number_of(node, "transB", 0) else (0, 1)
    left, right = channels.zero(first), channels.zero(second)
    rows, columns = left.axes[m], right.axes[n]
    everything = bool((left.axes[k] | right.axes[k_second]).all())
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        if (shape := channels.shape(bias)) is None:
            return None
        added = channels.zero(bias)
        everything = everything and added.everything
        rows = rows & added.everything
        columns = columns & (added.axes[-1] if shape and shape[-1].n == columns.size else added.everything)
    return [Zeros.of([rows, columns], everything=everything)]


# Attention (opset 23): query (batch, heads, sequence, head_dim), key and value with as many or fewer heads.


def _agree_attention(channels: Channels, node: ir.Node) -> None:
    query, key, value, out = _value(node, 0), _value(node, 1), _value(node, 2), node.outputs[0]
    shapes = [channels.shape(v) for v in (query, key, value, out)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        _keep_all(channels, node, "only heads on an axis of their own are understood")
        return
    for extra in (*node.inputs[3:], *node.outputs[1:]):
        channels.keep(extra, node, "masks and caches of attention keep their heads")
    for tensor in (query, key, value, out):
        channels.keep(tensor, node, "attention works along the sequence", axes=[0, 2])
    channels.keep(query, node, "the head dimension scales the scores", axes=[3])
    channels.keep(key, node, "the head dimension scales the scores", axes=[3])
    channels.tie([(value, 3), (out, 3)], node)
    heads, groups = channels.cut(query, 1).size, channels.cut(key, 1).size
    extra_tensors = any(extra is not None for extra in node.inputs[3:]) or len(node.outputs) > 1
    if heads % groups or extra_tensors:
        for tensor in (query, key, value, out):
            channels.keep(tensor, node, "heads of masks and caches are not understood", axes=[1])
        return
    per_group = heads // groups
    both = (channels.cut(query, 1) & channels.cut(out, 1)).reshape(groups, per_group)
    whole = np.asarray(both.all(axis=1))
    channels.tie([(key, 1), (value, 1)], node, limit=whole)
    group_cut = np.repeat(channels.cut(key, 1), per_group)
    channels.tie([(query, 1), (out, 1)], node, limit=group_cut)


def _zeros_attention(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, out = node.inputs[2], channels.shape(node.outputs[0])
    shape = channels.shape(value)
    if value is None or shape is None or out is None or len(shape) != 4 or len(node.outputs) > 1 or len(out) != 4:
        return None
    zeros = channels.zero(value)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    masks[1] = np.repeat(zeros.axes[1], out[1].n // shape[1].n)
    masks[3] = zeros.axes[3]
    return [Zeros.of(masks, everything=zeros.everything)]


# Operators that move channels.


def _agree_transpose(channels: Channels, node: ir.Node) -> None:
    shape = channels.shape(node.inputs[0])
    if shape is None:
        return
    for at, axis in enumerate(permutation(node, len(shape))):
        channels.tie([(_value(node, 0), axis), (node.outputs[0], at)], node)


def _zeros_transpose(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value = _value(node, 0)
    shape = channels.shape(value)
    if shape is None:
        return None
    zeros = channels.zero(value)
    return [Zeros(tuple(zeros.axes[axis] for axis in permutation(node, len(shape))), zeros.everything)]


def _agree_reshape(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    first, second = channels.shape(value), channels.shape(out)
    groups = match_axes(first, second) if first is not None and second is not None else None
    if first is None or second is None or groups is None:
        _keep_all(channels, node, "its target shape is unknown")
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
                channels.tie([(tensor, axis)], node, limit=mask, why="it regroups channels of which some have to stay")


def _group_grids(
    first: Shape, second: Shape, ours: range, theirs: range
) -> tuple[tuple[int, ...], tuple[int, ...]] | tuple[None, None]:
    left, right = grid_shape(first[ours.start : ours.stop]), grid_shape(second[theirs.start : theirs.stop])
    if left is None or right is None or np.prod(left, dtype=int) != np.prod(right, dtype=int):
        return None, None
    return left, right


def _zeros_reshape(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value = _value(node, 0)
    first, second = channels.shape(value), channels.shape(node.outputs[0])
    groups = match_axes(first, second) if first is not None and second is not None else None
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


def _remaining(channels: Channels, value: ir.Value) -> Shape:
    """The shape of `value` once its channels are cut."""
    shape = channels.shape(value)
    assert shape is not None
    return tuple(Axis(axis.outer, int((~channels.cut(value, i)).sum())) for i, axis in enumerate(shape))


def _rewrite_target_shape(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    if any(channels.cut(out, axis).any() for axis in range(len(channels.shape(out) or ()))):
        set_target_shape(node, _remaining(channels, value), _remaining(channels, out), channels.table)


def _agree_expand(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    own, wide = channels.shape(value), channels.shape(out)
    if own is None or wide is None:
        _keep_all(channels, node, "its target shape is unknown")
        return
    for axis, length in enumerate(own):
        at = axis + len(wide) - len(own)
        if length != ONE:
            channels.tie([(value, axis), (out, at)], node)


_zeros_expand = _combined(np.logical_and.reduce, slice(1))


def _agree_unsqueeze(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    for axis, at in _through(channels, value, out) or ():
        channels.tie([(value, axis), (out, at)], node)


def _zeros_unsqueeze(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, out = _value(node, 0), node.outputs[0]
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


def _pieces(channels: Channels, whole: ir.Value, parts: Sequence[ir.Value], axis: int) -> list[slice] | None:
    """Where each part lies along `axis` of the whole."""
    shapes = [channels.shape(part) for part in parts]
    total = channels.shape(whole)
    if total is None or total[axis].outer or any(s is None or s[axis].outer for s in shapes):
        return None
    ends = np.cumsum([s[axis].n for s in shapes if s is not None]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _agree_pieces(
    channels: Channels, node: ir.Node, whole: ir.Value, parts: Sequence[ir.Value], default_axis: int | None
) -> None:
    shape = channels.shape(whole)
    if shape is None or any(channels.shape(part) is None for part in parts):
        _keep_all(channels, node, "its shapes are unknown")
        return
    axis = number_of(node, "axis", default_axis or 0) % len(shape)
    for other in range(len(shape)):
        if other != axis:
            channels.tie([(whole, other), *((part, other) for part in parts)], node)
    pieces = _pieces(channels, whole, parts, axis)
    if pieces is None:
        for tensor in (whole, *parts):
            channels.keep(tensor, node, "it joins or splits a dynamic axis", axes=[axis])
        return
    mask = channels.cut(whole, axis).copy()
    for part, piece in zip(parts, pieces, strict=True):
        mask[piece] &= channels.cut(part, axis)
    # A part with nothing left would still be an operand: it keeps a channel.
    for piece in pieces:
        if mask[piece].all():
            mask[piece.start] = False
    channels.tie([(whole, axis)], node, limit=mask)
    for part, piece in zip(parts, pieces, strict=True):
        channels.tie([(part, axis)], node, limit=mask[piece])


def _agree_concat(channels: Channels, node: ir.Node) -> None:
    parts = [value for value in node.inputs if value is not None]
    _agree_pieces(channels, node, node.outputs[0], parts, None)


def _agree_split(channels: Channels, node: ir.Node) -> None:
    _agree_pieces(channels, node, _value(node, 0), node.outputs, 0)


def _zeros_concat(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    out = node.outputs[0]
    parts = [value for value in node.inputs if value is not None]
    shape = channels.shape(out)
    if shape is None or any(channels.shape(part) is None for part in parts):
        return None
    axis = number_of(node, "axis", 0) % len(shape)
    zeros = [channels.zero(part) for part in parts]
    masks = [np.logical_and.reduce([z.axes[a] for z in zeros]) if a != axis else None for a in range(len(shape))]
    pieces = _pieces(channels, out, parts, axis)
    along = np.concatenate([z.axes[axis] for z in zeros]) if pieces else np.zeros(shape[axis].n, dtype=np.bool_)
    return [Zeros.of([along if m is None else m for m in masks], everything=all(z.everything for z in zeros))]


def _zeros_split(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value = _value(node, 0)
    shape = channels.shape(value)
    if shape is None or any(channels.shape(part) is None for part in node.outputs):
        return None
    axis = number_of(node, "axis", 0) % len(shape)
    pieces = _pieces(channels, value, node.outputs, axis)
    zeros = channels.zero(value)
    if pieces is None:
        return None
    return [
        Zeros.of([m[piece] if a == axis else m for a, m in enumerate(zeros.axes)], everything=zeros.everything)
        for piece in pieces
    ]


def _rewrite_split(channels: Channels, node: ir.Node) -> None:
    shape = channels.shape(_value(node, 0))
    assert shape is not None
    axis = number_of(node, "axis", 0) % len(shape)
    if channels.cut(_value(node, 0), axis).any():
        set_integers(node, 1, [int((~channels.cut(part, axis)).sum()) for part in node.outputs])
        node.attributes.pop("num_outputs", None)


def _window(channels: Channels, node: ir.Node) -> dict[int, npt.NDArray[np.intp]] | None:
    """Per static axis of a Slice the channels that it takes; None unless bounds are constant and steps are 1."""
    shape = channels.shape(node.inputs[0])
    starts, ends = channels.table.integers(node.inputs[1]), channels.table.integers(node.inputs[2])
    steps = channels.table.integers(node.inputs[4]) if len(node.inputs) > 4 else None
    if shape is None or starts is None or ends is None or (steps is None and len(node.inputs) > 4):
        return None
    axes = axes_of(channels.table, node, len(shape), index=3) or []
    if any(step != 1 for step in steps or ()):
        return None
    taken = {}
    for axis, start, end in zip(axes, starts, ends, strict=False):
        if not shape[axis].outer:
            taken[axis] = np.arange(shape[axis].n)[slice(start, end)]
    return taken


def _agree_slice(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    shape, window = channels.shape(value), _window(channels, node)
    if shape is None or window is None or channels.shape(out) is None:
        _keep_all(channels, node, "its bounds are not constant, or its steps are not 1")
        return
    for axis, length in enumerate(shape):
        taken = window.get(axis)
        if taken is not None:
            # Channels outside of the window are not asked for: they may go.
            mask = channels.cut(value, axis).copy()
            mask[taken] &= channels.cut(out, axis)
            channels.tie([(value, axis)], node, limit=mask)
            channels.tie([(out, axis)], node, limit=channels.cut(value, axis)[taken])
        elif channels.cut(out, axis).size == length.n:
            channels.tie([(value, axis), (out, axis)], node)


def _zeros_slice(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, out = _value(node, 0), channels.shape(node.outputs[0])
    window = _window(channels, node)
    if window is None or out is None:
        return None
    zeros = channels.zero(value)
    masks = [mask[window[axis]] if axis in window else mask for axis, mask in enumerate(zeros.axes)]
    return [Zeros.of(masks, everything=zeros.everything)] if len(masks) == len(out) else None


def _rewrite_slice(channels: Channels, node: ir.Node) -> None:
    value, window = _value(node, 0), _window(channels, node)
    shape = channels.shape(value)
    if window is None or shape is None or not any(channels.cut(value, axis).any() for axis in window):
        return
    axes = axes_of(channels.table, node, len(shape), index=3) or []
    starts, ends = channels.table.integers(node.inputs[1]) or [], channels.table.integers(node.inputs[2]) or []
    for at, axis in enumerate(axes):
        if axis in window:
            kept = np.flatnonzero(~channels.cut(value, axis))
            inside = np.flatnonzero(np.isin(kept, window[axis]))
            starts[at], ends[at] = int(inside[0]), int(inside[-1]) + 1
    set_integers(node, 1, starts)
    set_integers(node, 2, ends)


def _agree_gather(channels: Channels, node: ir.Node) -> None:
    data, indices, out = _value(node, 0), node.inputs[1], node.outputs[0]
    shape, index_shape = channels.shape(data), channels.shape(indices)
    if shape is None or index_shape is None or channels.shape(out) is None:
        _keep_all(channels, node, "its shapes are unknown")
        return
    axis = number_of(node, "axis", 0) % len(shape)
    for other in range(len(shape)):
        if other != axis:
            at = other if other < axis else other + len(index_shape) - 1
            channels.tie([(data, other), (out, at)], node)
    chosen = channels.table.integers(indices)
    if chosen is None or shape[axis].outer:
        channels.keep(data, node, "any of its rows may be asked for", axes=[axis])
    else:
        mask = np.ones(shape[axis].n, dtype=np.bool_)
        mask[np.asarray(chosen) % shape[axis].n] = False  # rows that are not picked may go
        channels.tie([(data, axis)], node, limit=mask)
    for at in range(axis, axis + len(index_shape)):
        channels.keep(out, node, "it picks every index", axes=[at])


def _zeros_gather(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    data, indices, out = _value(node, 0), node.inputs[1], channels.shape(node.outputs[0])
    shape, index_shape = channels.shape(data), channels.shape(indices)
    if shape is None or index_shape is None or out is None:
        return None
    axis = number_of(node, "axis", 0) % len(shape)
    zeros = channels.zero(data)
    masks = [*zeros.axes[:axis], *(np.zeros(a.n, dtype=np.bool_) for a in index_shape), *zeros.axes[axis + 1 :]]
    return [Zeros.of(masks, everything=zeros.everything)]


def _rewrite_gather(channels: Channels, node: ir.Node) -> None:
    data = _value(node, 0)
    shape = channels.shape(data)
    assert shape is not None
    axis = number_of(node, "axis", 0) % len(shape)
    cut = channels.cut(data, axis)
    chosen = channels.table.integers(node.inputs[1])
    if cut.any() and chosen is not None:
        position = np.cumsum(~cut) - 1
        rank = len(channels.shape(node.inputs[1]) or ())
        set_integers(node, 1, [int(position[i]) for i in chosen], scalar=rank == 0)


def _agree_shape(channels: Channels, node: ir.Node) -> None:
    """Lengths of dynamic axes stay; a static one that is asked for has to stay as well."""
    shape = channels.shape(node.inputs[0])
    rank = len(shape or ())
    start, end = number_of(node, "start", 0), number_of(node, "end", rank)
    asked = range(rank)[start:end]
    channels.keep(node.inputs[0], node, "its length is asked for", axes=asked)
    channels.keep(node.outputs[0], node, "it holds lengths")


ZERO_AT_ZERO = (
    *("Abs", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Elu", "Erf", "Floor", "Gelu", "HardSwish", "Identity"),
    *("LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu", "Sign", "Sin", "Sinh", "Softsign", "Sqrt", "Swish", "Tan"),
    *("Tanh", "ThresholdedRelu"),
)
NOT_ZERO_AT_ZERO = (
    "Cos",
    "Cosh",
    "Exp",
    "HardSigmoid",
    "IsInf",
    "IsNaN",
    "Log",
    "Not",
    "Reciprocal",
    "Sigmoid",
    "Softplus",
)

_UNARY_ZERO = Rule(_agree_elementwise, _first_zero)
_UNARY = Rule(_agree_elementwise)
_OVER_AXIS = "it works along this axis"

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(ZERO_AT_ZERO, _UNARY_ZERO),
        **dict.fromkeys(NOT_ZERO_AT_ZERO, _UNARY),
        **dict.fromkeys(["Add", "Sub", "Sum", "Max", "Min", "Mean"], Rule(_agree_elementwise, _all_zero, data=2**10)),
        "Mul": Rule(_agree_elementwise, _any_zero, data=2),
        "And": Rule(_agree_elementwise, _any_zero, data=2),
        "Div": Rule(_agree_elementwise, _first_zero, data=2),
        **dict.fromkeys(
            ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mod", "Or", "PRelu", "Pow", "Xor"],
            Rule(_agree_elementwise, data=2),
        ),
        "Where": Rule(_agree_elementwise, _branches_zero, data=3),
        "MatMul": Rule(_agree_matmul, _zeros_matmul, data=2),
        "Gemm": Rule(_agree_gemm, _zeros_gemm, data=3),
        "Attention": Rule(_agree_attention, _zeros_attention, data=3),
        **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), Rule(_whole_axes(_one_axis(-1), _OVER_AXIS), data=1)),
        **dict.fromkeys(
            ("LayerNormalization", "RMSNormalization"),
            Rule(_whole_axes(_from_axis, "a norm over fewer channels is another norm"), data=3),
        ),
        "Trilu": Rule(_whole_axes(_last_two, _OVER_AXIS)),
        **dict.fromkeys(("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"), Rule(_agree_reduce(sums=True))),
        **dict.fromkeys(
            ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"),
            Rule(_agree_reduce(sums=False)),
        ),
        "Transpose": Rule(_agree_transpose, _zeros_transpose),
        "Reshape": Rule(_agree_reshape, _zeros_reshape, _rewrite_target_shape),
        "Flatten": Rule(_agree_reshape, _zeros_reshape),
        "Expand": Rule(_agree_expand, _zeros_expand, _rewrite_target_shape),
        "Unsqueeze": Rule(_agree_unsqueeze, _zeros_unsqueeze),
        "Squeeze": Rule(_agree_unsqueeze, _zeros_unsqueeze),
        "Concat": Rule(_agree_concat, _zeros_concat, data=2**10),
        "Split": Rule(_agree_split, _zeros_split, _rewrite_split),
        "Slice": Rule(_agree_slice, _zeros_slice, _rewrite_slice),
        "Gather": Rule(_agree_gather, _zeros_gather, _rewrite_gather),
        "Shape": Rule(_agree_shape),
    }
)
"""Operator -> rule."""
