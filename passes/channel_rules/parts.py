"""Operators that join or take parts of an axis, and Shape, which reads its length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.channel_rules.rule import Rule, keep_all, remaining, value_of
from cpcompile.passes.channels import Channels, Mask, Zeros
from cpcompile.passes.nodes import constant_of, int_attribute
from cpcompile.passes.shape_inputs import pick_channels, set_integers
from cpcompile.passes.symbolic_shapes import axes_of


def _pieces(channels: Channels, whole: ir.Value, parts: Sequence[ir.Value], axis: int) -> list[slice] | None:
    """Where each part lies along `axis` of the whole."""
    shapes = [channels.shape(part) for part in parts]
    total = channels.shape(whole)
    if total is None or total[axis].outer or any(s is None or s[axis].outer for s in shapes):
        return None
    ends = np.cumsum([s[axis].n for s in shapes if s is not None]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _agree_pieces(
    channels: Channels, node: ir.Node, whole: ir.Value, parts: Sequence[ir.Value], *, may_go: bool
) -> None:
    """Each piece of the whole loses what its part loses; a part that `may_go` stays as it is if its piece goes."""
    shape = channels.shape(whole)
    if shape is None or any(channels.shape(part) is None for part in parts):
        keep_all(channels, node, "its shapes are unknown")
        return
    axis = int_attribute(node, "axis", 0) % len(shape)
    for other in range(len(shape)):
        if other != axis:
            channels.couple([(whole, other), *((part, other) for part in parts)], node)
    pieces = _pieces(channels, whole, parts, axis)
    if pieces is None:
        for tensor in (whole, *parts):
            channels.keep(tensor, node, "it joins or splits a dynamic axis", axes=[axis])
        return
    mask, reasons = channels.cut(whole, axis).copy(), channels.reasons((whole, axis)).copy()
    tied = [own for own in zip(parts, pieces, strict=True) if not (may_go and _is_gone(mask[own[1]]))]
    for part, piece in zip(parts, pieces, strict=True):
        kept = mask[piece] & ~channels.cut(part, axis)  # looked at, also if it is not tied
        if (part, piece) in tied:
            reasons[piece][kept] = channels.reasons((part, axis))[kept]
            mask[piece] &= ~kept
    channels.shrink((whole, axis), mask, reasons)
    for part, piece in tied:
        channels.shrink((part, axis), mask[piece], reasons[piece])


def _is_gone(piece: Mask) -> bool:
    return piece.size > 0 and bool(piece.all())


def _agree_concat(channels: Channels, node: ir.Node) -> None:
    parts = [value for value in node.inputs if value is not None]
    _agree_pieces(channels, node, node.outputs[0], parts, may_go=True)


def _agree_split(channels: Channels, node: ir.Node) -> None:
    _agree_pieces(channels, node, value_of(node, 0), node.outputs, may_go=False)


def _zeros_concat(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    out = node.outputs[0]
    parts = [value for value in node.inputs if value is not None]
    shape = channels.shape(out)
    if shape is None or any(channels.shape(part) is None for part in parts):
        return None
    axis = int_attribute(node, "axis", 0) % len(shape)
    zeros = [channels.zero(part) for part in parts]
    masks = [np.zeros(length.n, dtype=np.bool_) for length in shape]
    for other, mask in enumerate(masks):
        if other != axis and all(z.axes[other].size == mask.size for z in zeros):
            masks[other] = np.logical_and.reduce([z.axes[other] for z in zeros])
    if _pieces(channels, out, parts, axis):
        masks[axis] = np.concatenate([z.axes[axis] for z in zeros])
    return [Zeros.of(masks, everything=all(z.everything for z in zeros))]


def _zeros_split(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value = value_of(node, 0)
    shape = channels.shape(value)
    if shape is None or any(channels.shape(part) is None for part in node.outputs):
        return None
    axis = int_attribute(node, "axis", 0) % len(shape)
    pieces = _pieces(channels, value, node.outputs, axis)
    zeros = channels.zero(value)
    if pieces is None:
        return None
    return [
        Zeros.of([m[piece] if a == axis else m for a, m in enumerate(zeros.axes)], everything=zeros.everything)
        for piece in pieces
    ]


def _rewrite_concat(channels: Channels, node: ir.Node) -> None:
    """Leave out the parts of which no channel is left."""
    out, parts = node.outputs[0], [value for value in node.inputs if value is not None]
    axis = int_attribute(node, "axis", 0) % len(channels.shape(out) or (0,))
    pieces, cut = _pieces(channels, out, parts, axis), channels.cut(out, axis)
    left = parts if pieces is None else [p for p, piece in zip(parts, pieces, strict=True) if not _is_gone(cut[piece])]
    node.resize_inputs(len(left))
    for at, part in enumerate(left):
        node.replace_input_with(at, part)
    if len(left) == 1 < len(parts):
        node.op_type = "Identity"
        node.attributes.clear()


def _rewrite_split(channels: Channels, node: ir.Node) -> None:
    shape = channels.shape(value_of(node, 0))
    assert shape is not None
    axis = int_attribute(node, "axis", 0) % len(shape)
    if channels.cut(value_of(node, 0), axis).any():
        set_integers(node, 1, [int((~channels.cut(part, axis)).sum()) for part in node.outputs])
        node.attributes.pop("num_outputs", None)


def _window(channels: Channels, node: ir.Node) -> dict[int, npt.NDArray[np.intp]] | None:
    """Per axis that a Slice cuts the channels that it takes, in their order; None unless bounds are constant.

    Of a dynamic axis no channels are listed, because nothing is known about them.
    """
    shape = channels.shape(node.inputs[0])
    starts, ends = channels.table.integers(node.inputs[1]), channels.table.integers(node.inputs[2])
    has_steps = len(node.inputs) > 4 and node.inputs[4] is not None
    steps = channels.table.integers(node.inputs[4]) if has_steps else []
    axes = axes_of(channels.table, node, len(shape), index=3) if shape is not None else None
    if shape is None or axes is None or starts is None or ends is None or steps is None:
        return None
    return {
        axis: np.arange(0 if shape[axis].outer else shape[axis].n)[slice(start, end, step)]
        for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=False)
    }


def _agree_slice(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    shape, window = channels.shape(value), _window(channels, node)
    if shape is None or window is None or channels.shape(out) is None:
        keep_all(channels, node, "its bounds are not constant")
        return
    for axis, length in enumerate(shape):
        taken = window.get(axis)
        if taken is not None and (length.outer or taken.size != channels.cut(out, axis).size):
            for tensor in (value, out):
                channels.keep(tensor, node, "it takes a part of a dynamic axis", axes=[axis])
        elif taken is not None:
            # Nothing needs channels outside the window: they may go.
            mask, reasons = np.ones(length.n, dtype=np.bool_), np.full(length.n, None, dtype=np.object_)
            mask[taken], reasons[taken] = channels.cut(out, axis), channels.reasons((out, axis))
            channels.shrink((value, axis), mask, reasons)
            channels.shrink((out, axis), channels.cut(value, axis)[taken], channels.reasons((value, axis))[taken])
        else:
            channels.couple([(value, axis), (out, axis)], node)


def _zeros_slice(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, out = value_of(node, 0), channels.shape(node.outputs[0])
    window = _window(channels, node)
    if window is None or out is None:
        return None
    zeros = channels.zero(value)
    if len(zeros.axes) != len(out):
        return None
    masks = [mask[window[axis]] if axis in window else mask for axis, mask in enumerate(zeros.axes)]
    # Nothing is known about part of a dynamic axis.
    masks = [m if m.size == axis.n else np.zeros(axis.n, dtype=np.bool_) for m, axis in zip(masks, out, strict=True)]
    return [Zeros.of(masks, everything=zeros.everything)]


def _rewrite_slice(channels: Channels, node: ir.Node) -> None:
    """Take what is left of each window: with bounds and a step if they can express it, else with a Gather in front.

    All bounds are written anew, because those that count from the end would mean other channels of a shorter axis.
    """
    value, window = value_of(node, 0), _window(channels, node)
    shape = channels.shape(value)
    if window is None or shape is None or not any(channels.cut(value, axis).any() for axis in window):
        return
    axes = axes_of(channels.table, node, len(shape), index=3) or []
    starts, ends = channels.table.integers(node.inputs[1]) or [], channels.table.integers(node.inputs[2]) or []
    steps = (channels.table.integers(node.inputs[4]) if len(node.inputs) > 4 else None) or [1] * len(starts)
    left = remaining(channels, value)
    for at, axis in enumerate(axes):
        if axis not in window or shape[axis].outer:
            continue
        gone = channels.cut(value, axis)
        position = np.cumsum(~gone) - 1
        asked = position[window[axis][~gone[window[axis]]]]
        gaps = np.unique(np.diff(asked))
        if gaps.size > 1:
            left = pick_channels(node, axis, asked, left)
            starts[at], ends[at], steps[at] = 0, asked.size, 1
        elif not asked.size:
            starts[at], ends[at] = 0, 0
        else:
            steps[at] = int(gaps[0]) if gaps.size else 1
            beyond = int(asked[-1]) + steps[at]
            starts[at], ends[at] = int(asked[0]), beyond if beyond >= 0 else -1 - int((~gone).sum())
    for index, numbers in ((1, starts), (2, ends), (4, steps)):
        if index < len(node.inputs):
            set_integers(node, index, numbers)


def _agree_gather(channels: Channels, node: ir.Node) -> None:
    data, indices, out = value_of(node, 0), node.inputs[1], node.outputs[0]
    shape, index_shape = channels.shape(data), channels.shape(indices)
    if shape is None or index_shape is None or channels.shape(out) is None:
        keep_all(channels, node, "its shapes are unknown")
        return
    axis = int_attribute(node, "axis", 0) % len(shape)
    for other in range(len(shape)):
        if other != axis:
            at = other if other < axis else other + len(index_shape) - 1
            channels.couple([(data, other), (out, at)], node)
    chosen = _chosen(channels, node)
    if chosen is None or chosen.ndim != 1:
        for at in range(axis, axis + len(index_shape)):
            channels.keep(out, node, "it picks every index", axes=[at])
    if chosen is None:
        channels.keep(data, node, "any of its rows may be picked", axes=[axis])
        return
    if chosen.ndim == 1:
        chosen = chosen[~channels.cut(out, axis)]  # nothing needs the row of an index whose result is cut
    mask = np.ones(shape[axis].n, dtype=np.bool_)
    mask[chosen] = False
    channels.couple([(data, axis)], node, limit=mask, why="it picks this row")


def _chosen(channels: Channels, node: ir.Node) -> npt.NDArray[np.intp] | None:
    """The rows that a Gather picks, counted from 0; None if they depend on the input."""
    indices, shape = value_of(node, 1), channels.shape(node.inputs[0])
    tensor, axis = constant_of(indices), int_attribute(node, "axis", 0)
    numbers = channels.table.integers(indices)
    if tensor is not None:
        picked = np.asarray(tensor.numpy(), dtype=np.intp)
    elif numbers is not None:
        picked = np.asarray(numbers, dtype=np.intp).reshape((-1,) * len(channels.shape(indices) or ()))
    else:
        return None
    return None if shape is None or shape[axis].outer or not shape[axis].n else picked % shape[axis].n


def _zeros_gather(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    data, indices, out = value_of(node, 0), node.inputs[1], channels.shape(node.outputs[0])
    shape, index_shape = channels.shape(data), channels.shape(indices)
    if shape is None or index_shape is None or out is None:
        return None
    axis = int_attribute(node, "axis", 0) % len(shape)
    zeros = channels.zero(data)
    chosen = _chosen(channels, node)
    if chosen is not None and chosen.ndim == 1:
        picked = [zeros.axes[axis][chosen]]
    else:
        picked = [np.zeros(a.n, dtype=np.bool_) for a in index_shape]
    masks = [*zeros.axes[:axis], *picked, *zeros.axes[axis + 1 :]]
    return [Zeros.of(masks, everything=zeros.everything)]


def _rewrite_gather(channels: Channels, node: ir.Node) -> None:
    """Count from 0 in what is left: a negative index would name another row of a shorter axis."""
    data, out, chosen = value_of(node, 0), node.outputs[0], _chosen(channels, node)
    shape = channels.shape(data)
    if shape is None or chosen is None:
        return
    axis = int_attribute(node, "axis", 0) % len(shape)
    asked = chosen[~channels.cut(out, axis)] if chosen.ndim == 1 else chosen
    gone = channels.cut(data, axis)
    if asked.size < chosen.size or gone.any():
        set_integers(node, 1, (np.cumsum(~gone) - 1)[asked])


def _agree_shape(channels: Channels, node: ir.Node) -> None:
    """Axes whose length is read have to stay whole, even static ones."""
    shape = channels.shape(node.inputs[0])
    rank = len(shape or ())
    start, end = int_attribute(node, "start", 0), int_attribute(node, "end", rank)
    asked = range(rank)[start:end]
    channels.keep(node.inputs[0], node, "its length is read", axes=asked)
    for axis in set(range(rank)) - set(asked):
        channels.couple([(value_of(node, 0), axis)], node)  # free to lose what others can spare
    channels.keep(node.outputs[0], node, "it holds lengths")


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Concat": Rule(_agree_concat, _zeros_concat, _rewrite_concat, data=2**10),
        "Split": Rule(_agree_split, _zeros_split, _rewrite_split),
        "Slice": Rule(_agree_slice, _zeros_slice, _rewrite_slice),
        "Gather": Rule(_agree_gather, _zeros_gather, _rewrite_gather),
        "Shape": Rule(_agree_shape),
    }
)
