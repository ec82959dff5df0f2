"""Mixing: operators by which all positions of an axis depend on each other; their ids are coupled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from cpcompile.partitioning.channel_ids import Value
from cpcompile.partitioning.flow import Flow, place
from cpcompile.partitioning.rules.rule import argument_of, as_channels, axis_of, first_value, rules_of


def _reduce(flow: Flow, node: fx.Node) -> Value:
    value, out = first_value(flow, node), flow.plain(node.meta["val"])
    given = argument_of(node, 1, "dim")
    axes = sorted({axis_of(value, a) for a in ([given] if isinstance(given, int) else given or range(value.rank))})
    merged = flow.merge(value, axes, f"{place(node)} is over all of it")
    if out.rank == value.rank:
        return replace(out, channel_ids=merged.channel_ids, constant=value.constant)
    channel_ids = tuple(ids.squeeze(axis=tuple(axes)) for ids in merged.channel_ids)
    return replace(out, channel_ids=channel_ids, constant=value.constant)


def _softmax(flow: Flow, node: fx.Node) -> Value:
    value = first_value(flow, node)
    merged = flow.merge(value, [axis_of(value, node.args[1])], f"{place(node)} is over all of it")  # type: ignore[arg-type]
    for ids in merged.channel_ids:
        flow.mark_attention(node, ids, value)
    return replace(flow.plain(node.meta["val"]), channel_ids=merged.channel_ids, constant=value.constant)


def _along(flow: Flow, node: fx.Node) -> Value:
    """Operators that depend on the order along an axis: cumsum, flip."""
    value = first_value(flow, node)
    given = argument_of(node, 1, "dim", -1)
    axes = [axis_of(value, a) for a in ([given] if isinstance(given, int) else given)]
    return flow.merge(value, axes, f"{place(node)} is along it")


def _norm(flow: Flow, node: fx.Node) -> Value:
    """layer_norm and rms_norm normalise over the last axes."""
    value = first_value(flow, node)
    count = len(node.args[1])  # type: ignore[arg-type]
    why = f"{place(node)} is over all of it"
    merged = flow.merge(value, range(value.rank - count, value.rank), why)
    scales = [v for v in (flow.value(a) for a in (*node.args[2:4], *node.kwargs.values())) if v is not None]
    return flow.agree([merged, *scales], flow.plain(node.meta["val"]), why)


def _group_norm(flow: Flow, node: fx.Node) -> Value:
    """The channels of a group are coupled."""
    value, groups = first_value(flow, node), node.args[1]
    why = f"{place(node)} is over the channels of a group"
    for ids in value.channel_ids:
        if ids.shape[1] > 1:
            cells = ids.reshape(ids.shape[0], groups, -1, *ids.shape[2:])  # type: ignore[arg-type]
            flow.coupling.couple(cells, cells[:, :, :1])
            flow.coupling.note_merge(ids, why)
    merged = flow.merge(value, range(2, value.rank), why)
    return _per_channel(flow, node, merged, node.args[2:4])


def _batch_norm(flow: Flow, node: fx.Node) -> Value:
    """Scale, bias, mean and variance are coupled with the channels."""
    value = first_value(flow, node)
    merged = flow.merge(value, range(2, value.rank), f"{place(node)} is over all positions")
    for argument in node.args[3:5]:  # buffers, which otherwise have no ids: they may be tables
        known = flow.value(argument)
        if known is not None and isinstance(argument, fx.Node) and not known.channel_ids and known.rank == 1:
            flow.values[argument] = known.with_ids([flow.coupling.fresh(known.shape)])
    return _per_channel(flow, node, merged, node.args[1:5])


def _per_channel(flow: Flow, node: fx.Node, value: Value, vectors: Iterable[object]) -> Value:
    known = [v for v in (flow.value(a) for a in vectors) if v is not None]
    return flow.agree(
        [value, *(as_channels(v, value.rank, 1) for v in known)],
        flow.plain(node.meta["val"]),
        f"{place(node)} has a scale that keeps it",
    )


def _spatial(flow: Flow, node: fx.Node) -> Value:
    """Pooling and resizing: channels are axis 1 (or 0 without a batch), positions after it are mixed."""
    value = first_value(flow, node)
    spatial = next((n for n in (1, 2, 3) if f"{n}d" in str(node.target)), value.rank - 2)
    merged = flow.merge(value, range(value.rank - spatial, value.rank), f"{place(node)} is over positions")
    return replace(flow.plain(node.meta["val"]), channel_ids=merged.channel_ids, constant=value.constant)


RULES = rules_of(
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
)
"""Operator without its overload -> rule."""
