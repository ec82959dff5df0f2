"""What every aten operator does with channel ids: one table, one rule per operator.

Pointwise operators are known by their tag; the others stand in `RULES`. An operator without a rule keeps the channels
of everything that it reads. Operators: https://docs.pytorch.org/docs/stable/torch.compiler_ir.html
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import fx

from cpcompile.partitioning.channel_ids import ChannelIds, Value, varied
from cpcompile.partitioning.flow import Flow, place

Result = Value | list[Value]
Rule = Callable[[Flow, fx.Node], Result]


def propagate(flow: Flow, node: fx.Node) -> Any:
    """The values of what `node` gives; None if that is no tensor."""
    example = node.meta.get("val")
    if node.target is operator.getitem:
        values = flow.values.get(node.args[0])  # type: ignore[arg-type]
        return values[node.args[1]] if isinstance(values, list) else None  # type: ignore[index]
    read = flow.tensors(node)
    if isinstance(example, (list, tuple)):
        plain = [flow.plain(e) if isinstance(e, torch.Tensor) else None for e in example]
    elif isinstance(example, torch.Tensor):
        plain = [flow.plain(example, constant=all(v.constant for v in read))]
    else:
        return None
    rule = RULES.get(str(node.target).removeprefix("aten.").split(".")[0].rstrip("_"))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    result: Any = plain if isinstance(example, (list, tuple)) else plain[0]
    if rule is None:
        why = f"there is no rule for {place(node)}"
        flow.block_all(read, why)
        if any(value.channel_ids for value in read):
            flow.opaque[node] = why
    elif any(value.channel_ids for value in read):
        result = rule(flow, node)
        results = result if isinstance(result, list) else [result]
        if any(value is not None and 0 in value.shape for value in results):  # an empty tensor holds no channels
            result = plain if isinstance(result, list) else plain[0]
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable and isinstance(node.args[0], fx.Node):
        flow.values[node.args[0]] = result  # in place
    return result


def _pointwise(flow: Flow, node: fx.Node) -> Value:
    return flow.agree(flow.tensors(node), flow.plain(node.meta["val"]), f"{place(node)} meets a tensor that keeps it")


def _first(flow: Flow, node: fx.Node) -> Value:
    value = flow.value(node.args[0])
    assert value is not None
    return value


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _axis(value: Value, axis: int) -> int:
    return axis % value.rank


# Movement: ids keep to their elements.


def _reshape(flow: Flow, node: fx.Node) -> Value:
    return flow.reshape(_first(flow, node), flow.plain(node.meta["val"]), f"{place(node)} mixes it with another axis")


def _identity(flow: Flow, node: fx.Node) -> Value:
    return _each(flow, node, lambda ids: ids)


def _each(flow: Flow, node: fx.Node, move: Callable[[ChannelIds], ChannelIds]) -> Value:
    value = _first(flow, node)
    channel_ids = tuple(move(ids) for ids in value.channel_ids)
    return replace(flow.plain(node.meta["val"]), channel_ids=channel_ids, constant=value.constant)


def _permute(flow: Flow, node: fx.Node) -> Value:
    return _each(flow, node, lambda ids: ids.transpose([int(a) for a in node.args[1]]))  # type: ignore[union-attr,arg-type]


def _transpose(flow: Flow, node: fx.Node) -> Value:
    first, second = node.args[1:3] if len(node.args) > 2 else (-2, -1)
    if _first(flow, node).rank < 2:
        return _first(flow, node)
    return _each(flow, node, lambda ids: ids.swapaxes(first, second))  # type: ignore[arg-type]


def _expand(flow: Flow, node: fx.Node) -> Value:
    rank = node.meta["val"].ndim
    return _each(flow, node, lambda ids: ids.reshape((1,) * (rank - ids.ndim) + ids.shape))


def _pick(flow: Flow, value: Value, axis: int, index: slice, why: str) -> Value:
    """Some positions of an axis; only along one whose ids are known position by position."""
    if any(ids.shape[axis] not in (1, value.shape[axis]) for ids in value.channel_ids) or value.dynamic[axis]:
        value = flow.merge(value, [axis], why)
    taken = [f if f.shape[axis] == 1 else f[(slice(None),) * axis + (index,)] for f in value.channel_ids]
    return value.with_ids(taken)


def _without(ids: ChannelIds, axis: int) -> ChannelIds:
    return ids.take([0], axis=axis).squeeze(axis)


def _slice(flow: Flow, node: fx.Node) -> Value:
    value = _first(flow, node)
    axis = _axis(value, _argument(node, 1, "dim", 0))
    start, end, step = (_argument(node, i, n, d) for i, n, d in ((2, "start", None), (3, "end", None), (4, "step", 1)))
    whole = (start in (0, None)) and step == 1 and flow.plain(node.meta["val"]).shape[axis] == value.shape[axis]
    if whole:
        return value
    if any(isinstance(bound, fx.Node) for bound in (start, end)):
        value = flow.merge(value, [axis], f"{place(node)} takes a part of varying length")
        return replace(flow.plain(node.meta["val"]), channel_ids=value.channel_ids, constant=value.constant)
    picked = _pick(flow, value, axis, slice(start, end, step), f"{place(node)} takes a part of it")
    return replace(flow.plain(node.meta["val"]), channel_ids=picked.channel_ids, constant=value.constant)


def _select(flow: Flow, node: fx.Node) -> Value:
    value = _first(flow, node)
    axis = _axis(value, node.args[1])  # type: ignore[arg-type]
    index = node.args[2]
    if not isinstance(index, int):
        value, index = flow.merge(value, [axis], f"{place(node)} takes one that varies"), 0
    picked = _pick(flow, value, axis, slice(index, index + 1 or None), f"{place(node)} takes one of it")
    channel_ids = tuple(_without(ids, axis) for ids in picked.channel_ids)
    return replace(flow.plain(node.meta["val"]), channel_ids=channel_ids, constant=value.constant)


def _split(flow: Flow, node: fx.Node) -> list[Value]:
    value = _first(flow, node)
    unbind = "unbind" in str(node.target)
    axis = _axis(value, _argument(node, 1 if unbind else 2, "dim", 0))
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
    axis = _axis(out, _argument(node, 1, "dim", 0))
    return _joined(flow, node, [v for v in values if v is not None and 0 not in v.shape], axis, out)


def _glu(flow: Flow, node: fx.Node) -> Value:
    """The first half times the sigmoid of the second."""
    value = _first(flow, node)
    axis = _axis(value, _argument(node, 1, "dim", -1))
    half, why = value.shape[axis] // 2, f"{place(node)} divides it"
    shape = tuple(half if a == axis else n for a, n in enumerate(value.shape))
    halves = [_pick(flow, value, axis, slice(start, start + half), why) for start in (0, half)]
    return flow.agree([replace(part, shape=shape) for part in halves], flow.plain(node.meta["val"]), why)


def _stack(flow: Flow, node: fx.Node) -> Value:
    out = flow.plain(node.meta["val"])
    axis = _axis(out, _argument(node, 1, "dim", 0))
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
    count, axis = node.args[1], _argument(node, 2, "dim")
    value = _first(flow, node)
    if not isinstance(count, int) or axis is None:
        flow.block_all([value], f"{place(node)} repeats it by data")
        return flow.plain(node.meta["val"])
    return _each(flow, node, lambda f: f if f.shape[axis] == 1 else f.repeat(count, axis=axis))


def _repeat(flow: Flow, node: fx.Node) -> Value:
    value, out = _first(flow, node), flow.plain(node.meta["val"])
    counts: Any = node.args[1]
    channel_ids = []
    for ids in value.channel_ids:
        lifted = ids.reshape((1,) * (out.rank - ids.ndim) + ids.shape)
        times = [c if n > 1 and isinstance(c, int) else 1 for c, n in zip(counts, lifted.shape, strict=True)]
        channel_ids.append(np.tile(lifted, times))
    return replace(out, channel_ids=tuple(channel_ids), constant=value.constant)


def _pad(flow: Flow, node: fx.Node) -> Value:
    """Pads from the last axis on; an axis that is padded stays whole."""
    value = _first(flow, node)
    sizes: Any = node.args[1]
    padded = [value.rank - 1 - i // 2 for i, size in enumerate(sizes) if size != 0]
    value = flow.merge(value, padded, f"{place(node)} pads it")
    return replace(flow.plain(node.meta["val"]), channel_ids=value.channel_ids, constant=value.constant)


# Mixing: all positions of an axis depend on each other.


def _reduce(flow: Flow, node: fx.Node) -> Value:
    value, out = _first(flow, node), flow.plain(node.meta["val"])
    given = _argument(node, 1, "dim")
    axes = sorted({_axis(value, a) for a in ([given] if isinstance(given, int) else given or range(value.rank))})
    merged = flow.merge(value, axes, f"{place(node)} is over all of it")
    if out.rank == value.rank:
        return replace(out, channel_ids=merged.channel_ids, constant=value.constant)
    channel_ids = tuple(ids.squeeze(axis=tuple(axes)) for ids in merged.channel_ids)
    return replace(out, channel_ids=channel_ids, constant=value.constant)


def _softmax(flow: Flow, node: fx.Node) -> Value:
    value = _first(flow, node)
    merged = flow.merge(value, [_axis(value, node.args[1])], f"{place(node)} is over all of it")  # type: ignore[arg-type]
    for ids in merged.channel_ids:
        flow.coupling.mark_attention(ids)
    return replace(flow.plain(node.meta["val"]), channel_ids=merged.channel_ids, constant=value.constant)


def _along(flow: Flow, node: fx.Node) -> Value:
    """Order along one axis: cumsum, flip, roll."""
    value = _first(flow, node)
    given = _argument(node, 1, "dim", -1)
    axes = [_axis(value, a) for a in ([given] if isinstance(given, int) else given)]
    return flow.merge(value, axes, f"{place(node)} is along it")


def _norm(flow: Flow, node: fx.Node) -> Value:
    """layer_norm and rms_norm: over the last axes."""
    value = _first(flow, node)
    count = len(node.args[1])  # type: ignore[arg-type]
    why = f"{place(node)} is over all of it"
    merged = flow.merge(value, range(value.rank - count, value.rank), why)
    scales = [v for v in (flow.value(a) for a in (*node.args[2:4], *node.kwargs.values())) if v is not None]
    return flow.agree([merged, *scales], flow.plain(node.meta["val"]), why)


def _group_norm(flow: Flow, node: fx.Node) -> Value:
    """Each group of channels is one."""
    value, groups = _first(flow, node), node.args[1]
    why = f"{place(node)} is over the channels of a group"
    for ids in value.channel_ids:
        if ids.shape[1] > 1:
            cells = ids.reshape(ids.shape[0], groups, -1, *ids.shape[2:])  # type: ignore[arg-type]
            flow.coupling.couple(cells, cells[:, :, :1])
            flow.coupling.note_merge(ids, why)
    merged = flow.merge(value, range(2, value.rank), why)
    return _per_channel(flow, node, merged, node.args[2:4])


def _batch_norm(flow: Flow, node: fx.Node) -> Value:
    """Scale, bias, mean and variance belong to the channels."""
    value = _first(flow, node)
    merged = flow.merge(value, range(2, value.rank), f"{place(node)} is over all positions")
    for argument in node.args[3:5]:  # buffers, which otherwise have no ids: they may be tables
        known = flow.value(argument)
        if known is not None and isinstance(argument, fx.Node) and not known.channel_ids and known.rank == 1:
            flow.values[argument] = known.with_ids([flow.coupling.fresh(known.shape)])
    return _per_channel(flow, node, merged, node.args[1:5])


def _per_channel(flow: Flow, node: fx.Node, value: Value, vectors: Iterable[object]) -> Value:
    known = [v for v in (flow.value(a) for a in vectors) if v is not None]
    return flow.agree(
        [value, *(_as_channels(v, value.rank, 1) for v in known)],
        flow.plain(node.meta["val"]),
        f"{place(node)} has a scale that keeps it",
    )


def _as_channels(vector: Value, rank: int, axis: int) -> Value:
    """A vector of channels in a tensor of `rank` with channels at `axis`."""

    def placed(length: int) -> tuple[int, ...]:
        return tuple(length if a == axis else 1 for a in range(rank))

    channel_ids = tuple(ids.reshape(placed(ids.size)) for ids in vector.channel_ids)
    return Value(placed(vector.shape[0]), (False,) * rank, channel_ids, vector.constant)


def _spatial(flow: Flow, node: fx.Node) -> Value:
    """Pooling and resizing: channels are axis 1 (or 0 without a batch), positions after it are mixed."""
    value = _first(flow, node)
    spatial = next((n for n in (1, 2, 3) if f"{n}d" in str(node.target)), value.rank - 2)
    merged = flow.merge(value, range(value.rank - spatial, value.rank), f"{place(node)} is over positions")
    return replace(flow.plain(node.meta["val"]), channel_ids=merged.channel_ids, constant=value.constant)


# Contraction.


def _linear(flow: Flow, node: fx.Node) -> Value:
    source, weight = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    x, w = flow.value(source), flow.value(weight)
    assert x is not None and w is not None
    if w.constant and not x.constant:
        out = flow.contract(node, source, weight, (x.rank - 1, 1, 0, x.rank - 1))
    else:
        turned = replace(
            w, shape=w.shape[::-1], dynamic=w.dynamic[::-1], channel_ids=tuple(ids.T for ids in w.channel_ids)
        )
        out = _product(flow, node, x, turned)
    return _plus(flow, node, out, _argument(node, 2, "bias"))


def _matmul(flow: Flow, node: fx.Node) -> Value:
    source, weight = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    return _times(flow, node, source, weight)


def _addmm(flow: Flow, node: fx.Node) -> Value:
    bias, source, weight = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    return _plus(flow, node, _times(flow, node, source, weight), bias)


def _times(flow: Flow, node: fx.Node, source: fx.Node, weight: fx.Node) -> Value:
    x, w = flow.value(source), flow.value(weight)
    assert x is not None and w is not None
    if min(x.rank, w.rank) < 2:
        flow.block_all([x, w], f"{place(node)} is of a vector")
        return flow.plain(node.meta["val"])
    if w.constant and not x.constant and w.rank == 2:
        return flow.contract(node, source, weight, (x.rank - 1, 0, 1, x.rank - 1))
    return _product(flow, node, x, w)


def _product(flow: Flow, node: fx.Node, x: Value, w: Value) -> Value:
    """(.., m, k) x (.., k, n): k is summed over, the other axes agree."""
    why = f"{place(node)} sums over it"
    rows = _with_length_one(flow.merge(x, [x.rank - 1], why), x.rank - 1)
    columns = _with_length_one(flow.merge(w, [w.rank - 2], why), w.rank - 2)
    return flow.agree([rows, columns], flow.plain(node.meta["val"]), why)


def _with_length_one(value: Value, axis: int) -> Value:
    return replace(value, shape=tuple(1 if a == axis else n for a, n in enumerate(value.shape)))


def _plus(flow: Flow, node: fx.Node, out: Value, bias: object) -> Value:
    added = flow.value(bias)
    if added is None:
        return out
    return flow.agree([out, added], flow.plain(node.meta["val"]), f"{place(node)} adds a bias that keeps it")


def _convolution(flow: Flow, node: fx.Node) -> Value:
    source, weight = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    x, w = flow.value(source), flow.value(weight)
    assert x is not None and w is not None
    transposed = bool(_argument(node, 6, "transposed", False)) if "convolution" in str(node.target) else False
    groups = _argument(node, 8 if "convolution" in str(node.target) else 6, "groups", 1)
    if transposed or (isinstance(_argument(node, 4, "padding"), str) and not w.constant) or not w.constant:
        flow.block_all([x, w], f"there is no rule for {place(node)}")
        return flow.plain(node.meta["val"])
    axis = x.rank - (w.rank - 2) - 1
    x = flow.merge(x, range(axis + 1, x.rank), f"{place(node)} is over positions")
    flow.values[source], before = x, flow.values[source]
    if groups == 1:
        out = flow.contract(node, source, weight, (axis, 1, 0, axis))
    else:
        out = _grouped(flow, node, x, w, axis, groups)
    flow.values[source] = before
    bias = flow.value(_argument(node, 2, "bias"))
    if bias is None:
        return out
    return flow.agree(
        [out, _as_channels(bias, out.rank, axis)],
        flow.plain(node.meta["val"]),
        f"{place(node)} adds a bias that keeps it",
    )


def _grouped(flow: Flow, node: fx.Node, x: Value, w: Value, axis: int, groups: int) -> Value:
    """A group of channels goes in and comes out together; with one channel each, every channel by itself."""
    out = flow.plain(node.meta["val"])
    why = f"{place(node)} mixes the channels of a group"
    w = flow.merge(w, range(1, w.rank), why)
    makes = [ids.reshape(groups, -1) for ids in w.channel_ids if 0 in varied(ids)]
    takes = [ids.reshape(groups, -1) for ids in x.channel_ids if varied(ids) == {axis}]
    others = [ids for ids in x.channel_ids if varied(ids) != {axis}]
    if not makes or not takes or others:
        flow.block_all([x, w], f"{place(node)} is in groups that do not follow its channels")
        return out
    for cells in (*makes, *takes):
        flow.coupling.couple(cells, makes[0][:, :1])
    shape = [1] * out.rank
    shape[axis] = out.shape[axis]
    return replace(out, channel_ids=(makes[0].reshape(shape),))


def _attention(flow: Flow, node: fx.Node) -> Value:
    """softmax(q k / sqrt(d) + mask) v: heads stay apart, key heads are repeated for their query heads."""
    query, key, value = (flow.value(argument) for argument in node.args[:3])
    assert query is not None and key is not None and value is not None
    mask = flow.value(_argument(node, 3, "attn_mask"))
    out, rank = flow.plain(node.meta["val"]), query.rank
    why = f"{place(node)} sums over it"
    if node.kwargs.get("enable_gqa") and rank > 2:
        key, value = (_repeated(v, query.shape[-3]) for v in (key, value))
    rows = _with_length_one(flow.merge(query, [rank - 1], why), rank - 1)
    columns = _with_length_one(flow.merge(key, [rank - 2, rank - 1], why), rank - 1)
    turned = replace(columns, shape=(*columns.shape[:-2], 1, columns.shape[-2]))
    scores = replace(out, shape=(*out.shape[:-1], key.shape[-2]), dynamic=(*out.dynamic[:-1], key.dynamic[-2]))
    scores = flow.agree([rows, turned, *([] if mask is None else [mask])], scores, why)
    scores = flow.merge(scores, [rank - 1], why)
    for ids in scores.channel_ids:
        flow.coupling.mark_attention(ids)
    mixed = _with_length_one(flow.merge(value, [rank - 2], why), rank - 2)
    return flow.agree([_with_length_one(scores, rank - 1), mixed], out, why)


def _repeated(value: Value, heads: int) -> Value:
    """Each key head beside its query heads (axis -3)."""
    times = heads // value.shape[-3]
    shape = (*value.shape[:-3], heads, *value.shape[-2:])
    channel_ids = [f if f.shape[-3] == 1 else f.repeat(times, axis=f.ndim - 3) for f in value.channel_ids]
    if value.shape[-3] == 1 and heads > 1:  # one for all: nothing of it belongs to one query head
        return replace(value, shape=shape)
    return replace(value, shape=shape, channel_ids=tuple(channel_ids))


def _embedding(flow: Flow, node: fx.Node) -> Value:
    table, out = _first(flow, node), flow.plain(node.meta["val"])
    columns = []
    for ids in table.channel_ids:
        if 0 in varied(ids):
            flow.coupling.block(ids, f"{place(node)} picks rows by what it reads")
        else:
            columns.append(ids.reshape((1,) * (out.rank - 1) + ids.shape[1:]))
    return replace(out, channel_ids=tuple(columns))


def _no_channels(flow: Flow, node: fx.Node) -> Value:
    """The result has nothing to do with the elements that are read."""
    return flow.plain(node.meta["val"])


def _table(**families: tuple[Rule, str]) -> Mapping[str, Rule]:
    return MappingProxyType({name: rule for rule, names in families.values() for name in names.split()})


RULES = _table(
    pointwise=(
        _pointwise,
        "where rsub square relu6 hardswish hardtanh mish selu celu elu log_sigmoid clip true_divide divide multiply "
        "subtract floor_divide masked_fill",
    ),
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
    reduce=(_reduce, "mean sum amax amin var std prod all any logsumexp argmax"),
    softmax=(_softmax, "softmax _softmax _safe_softmax log_softmax"),
    along=(_along, "cumsum flip"),
    norm=(_norm, "layer_norm rms_norm"),
    group_norm=(_group_norm, "group_norm"),
    batch_norm=(_batch_norm, "batch_norm"),
    spatial=(
        _spatial,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "upsample_nearest2d upsample_bilinear2d",
    ),
    linear=(_linear, "linear"),
    matmul=(_matmul, "matmul mm bmm"),
    addmm=(_addmm, "addmm baddbmm"),
    convolution=(_convolution, "conv1d conv2d conv3d convolution"),
    attention=(_attention, "scaled_dot_product_attention"),
    embedding=(_embedding, "embedding"),
    no_channels=(_no_channels, "new_zeros new_ones new_full new_empty sym_size"),
)
"""Operator without its overload -> rule."""
