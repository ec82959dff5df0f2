"""Movement: operators that move, join, divide or repeat elements; ids keep to their elements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from cpcompile.partitioning.channel_ids import ChannelIds, Value, varied
from cpcompile.partitioning.flow import Flow, place
from cpcompile.partitioning.rules.rule import argument_of, axis_of, first_value, move_each, rules_of


def _reshape(flow: Flow, node: fx.Node) -> Value:
    return flow.reshape(
        first_value(flow, node), flow.plain(node.meta["val"]), f"{place(node)} mixes it with another axis"
    )


def _identity(flow: Flow, node: fx.Node) -> Value:
    return move_each(flow, node, lambda ids: ids)


def _permute(flow: Flow, node: fx.Node) -> Value:
    return move_each(flow, node, lambda ids: ids.transpose([int(a) for a in node.args[1]]))  # type: ignore[union-attr,arg-type]


def _transpose(flow: Flow, node: fx.Node) -> Value:
    first, second = node.args[1:3] if len(node.args) > 2 else (-2, -1)
    if first_value(flow, node).rank < 2:
        return first_value(flow, node)
    return move_each(flow, node, lambda ids: ids.swapaxes(first, second))  # type: ignore[arg-type]


def _expand(flow: Flow, node: fx.Node) -> Value:
    rank = node.meta["val"].ndim
    return move_each(flow, node, lambda ids: ids.reshape((1,) * (rank - ids.ndim) + ids.shape))


def _pick(flow: Flow, value: Value, axis: int, index: slice, why: str) -> Value:
    """Select positions of an axis, whose ids are merged unless they are known for every position."""
    if any(ids.shape[axis] not in (1, value.shape[axis]) for ids in value.channel_ids) or value.dynamic[axis]:
        value = flow.merge(value, [axis], why)
    taken = [f if f.shape[axis] == 1 else f[(slice(None),) * axis + (index,)] for f in value.channel_ids]
    return value.with_ids(taken)


def _without(ids: ChannelIds, axis: int) -> ChannelIds:
    return ids.take([0], axis=axis).squeeze(axis)


def _slice(flow: Flow, node: fx.Node) -> Value:
    value = first_value(flow, node)
    axis = axis_of(value, argument_of(node, 1, "dim", 0))
    start, end, step = (
        argument_of(node, i, n, d) for i, n, d in ((2, "start", None), (3, "end", None), (4, "step", 1))
    )
    whole = (start in (0, None)) and step == 1 and flow.plain(node.meta["val"]).shape[axis] == value.shape[axis]
    if whole:
        return value
    if any(isinstance(bound, fx.Node) for bound in (start, end)):
        value = flow.merge(value, [axis], f"{place(node)} takes a part of varying length")
        return replace(flow.plain(node.meta["val"]), channel_ids=value.channel_ids, constant=value.constant)
    picked = _pick(flow, value, axis, slice(start, end, step), f"{place(node)} takes a part of it")
    return replace(flow.plain(node.meta["val"]), channel_ids=picked.channel_ids, constant=value.constant)


def _select(flow: Flow, node: fx.Node) -> Value:
    value = first_value(flow, node)
    axis = axis_of(value, node.args[1])  # type: ignore[arg-type]
    index = node.args[2]
    if not isinstance(index, int):
        value, index = flow.merge(value, [axis], f"{place(node)} takes one that varies"), 0
    picked = _pick(flow, value, axis, slice(index, index + 1 or None), f"{place(node)} takes one of it")
    channel_ids = tuple(_without(ids, axis) for ids in picked.channel_ids)
    return replace(flow.plain(node.meta["val"]), channel_ids=channel_ids, constant=value.constant)


def _split(flow: Flow, node: fx.Node) -> list[Value]:
    value = first_value(flow, node)
    unbind = "unbind" in str(node.target)
    axis = axis_of(value, argument_of(node, 1 if unbind else 2, "dim", 0))
    parts, start = [], 0
    for example in node.meta["val"]:
        plain = flow.plain(example)
        length = 1 if unbind else plain.shape[axis]
        picked = _pick(flow, value, axis, slice(start, start + length), f"{place(node)} divides it")
        channel_ids = tuple(_without(f, axis) if unbind else f for f in picked.channel_ids)
        parts.append(replace(plain, channel_ids=channel_ids, constant=value.constant))
        start += length
    return parts


def _cat(flow: Flow, node: fx.Node) -> Value:
    values = [flow.value(argument) for argument in node.args[0]]  # type: ignore[union-attr]
    out = flow.plain(node.meta["val"])
    axis = axis_of(out, argument_of(node, 1, "dim", 0))
    return _joined(flow, node, [v for v in values if v is not None and 0 not in v.shape], axis, out)


def _glu(flow: Flow, node: fx.Node) -> Value:
    """The first half times the sigmoid of the second."""
    value = first_value(flow, node)
    axis = axis_of(value, argument_of(node, 1, "dim", -1))
    half, why = value.shape[axis] // 2, f"{place(node)} divides it"
    shape = tuple(half if a == axis else n for a, n in enumerate(value.shape))
    halves = [_pick(flow, value, axis, slice(start, start + half), why) for start in (0, half)]
    return flow.agree([replace(part, shape=shape) for part in halves], flow.plain(node.meta["val"]), why)


def _stack(flow: Flow, node: fx.Node) -> Value:
    out = flow.plain(node.meta["val"])
    axis = axis_of(out, argument_of(node, 1, "dim", 0))
    values = []
    for argument in node.args[0]:  # type: ignore[union-attr]
        value = flow.value(argument)
        assert value is not None
        values.append(
            Value(
                (*value.shape[:axis], 1, *value.shape[axis:]),
                (*value.dynamic[:axis], False, *value.dynamic[axis:]),
                tuple(np.expand_dims(ids, axis) for ids in value.channel_ids),
                value.constant,
            )
        )
    return _joined(flow, node, values, axis, out)


def _joined(flow: Flow, node: fx.Node, values: list[Value], axis: int, out: Value) -> Value:
    """Side by side along `axis`: ids follow each other there, and agree along the other axes."""
    why = f"{place(node)} joins it with channels that stay"
    grids = {frozenset(varied(f) - {axis}) for v in values for f in v.channel_ids if axis in varied(f) or not varied(f)}
    complete = all(any(axis in varied(f) or not varied(f) for f in v.channel_ids) for v in values)
    alone = all(varied(f) <= {axis} for v in values for f in v.channel_ids)
    if out.dynamic[axis] or len(grids) > 1 or not (complete or alone):
        values = [flow.merge(value, [axis], why) for value in values]
        grids = set()
    along: list[ChannelIds] = []
    if grids:
        for value in values:
            own = [f for f in value.channel_ids if axis in varied(f) or not varied(f)]
            for ids in own[1:]:
                flow.coupling.couple(own[0], ids)
            shape = [1] * out.rank
            shape[axis] = value.shape[axis]
            if not own:
                own = [flow.coupling.fresh(tuple(shape))]
                flow.coupling.block(own[0], why)
            lengths = [value.shape[a] if a == axis else n for a, n in enumerate(own[0].shape)]
            along.append(np.broadcast_to(own[0], lengths))
    across = [
        Value(
            tuple(1 if a == axis else n for a, n in enumerate(value.shape)),
            value.dynamic,
            tuple(f for f in value.channel_ids if varied(f) and axis not in varied(f)),
            value.constant,
        )
        for value in values
    ]
    agreed = flow.agree(across, replace(out, shape=tuple(1 if a == axis else n for a, n in enumerate(out.shape))), why)
    joined = (np.concatenate(along, axis=axis),) if along else ()
    return replace(out, channel_ids=agreed.channel_ids + joined, constant=agreed.constant)


def _repeat_interleave(flow: Flow, node: fx.Node) -> Value:
    count, axis = node.args[1], argument_of(node, 2, "dim")
    value = first_value(flow, node)
    if not isinstance(count, int) or axis is None:
        flow.block_all([value], f"{place(node)} repeats it by data")
        return flow.plain(node.meta["val"])
    return move_each(flow, node, lambda f: f if f.shape[axis] == 1 else f.repeat(count, axis=axis))


def _repeat(flow: Flow, node: fx.Node) -> Value:
    value, out = first_value(flow, node), flow.plain(node.meta["val"])
    counts: Any = node.args[1]
    channel_ids = []
    for ids in value.channel_ids:
        lifted = ids.reshape((1,) * (out.rank - ids.ndim) + ids.shape)
        times = [c if n > 1 and isinstance(c, int) else 1 for c, n in zip(counts, lifted.shape, strict=True)]
        channel_ids.append(np.tile(lifted, times))
    return replace(out, channel_ids=tuple(channel_ids), constant=value.constant)


def _pad(flow: Flow, node: fx.Node) -> Value:
    """Sizes start from the last axis; an axis that is padded stays whole."""
    value = first_value(flow, node)
    sizes: Any = node.args[1]
    padded = [value.rank - 1 - i // 2 for i, size in enumerate(sizes) if size != 0]
    value = flow.merge(value, padded, f"{place(node)} pads it")
    return replace(flow.plain(node.meta["val"]), channel_ids=value.channel_ids, constant=value.constant)


RULES = rules_of(
    identity=(
        _identity,
        "clone contiguous detach alias dropout feature_dropout to _to_copy type_as lift_fresh_copy "
        "zeros_like ones_like full_like",
    ),
    glu=(_glu, "glu"),
    reshape=(_reshape, "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as"),
    permute=(_permute, "permute"),
    transpose=(_transpose, "transpose t numpy_T mT swapaxes"),
    expand=(_expand, "expand expand_as"),
    slices=(_slice, "slice narrow_copy"),
    select=(_select, "select"),
    split=(_split, "split split_with_sizes chunk unbind"),
    cat=(_cat, "cat concat"),
    stack=(_stack, "stack"),
    repeat=(_repeat, "repeat"),
    repeat_interleave=(_repeat_interleave, "repeat_interleave"),
    pad=(_pad, "pad constant_pad_nd"),
)
"""Operator without its overload -> rule."""
