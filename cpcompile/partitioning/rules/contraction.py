"""Contraction: operators that sum over an axis of two tensors: products, convolutions, attention."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from cpcompile.partitioning.channel_ids import Value, varied
from cpcompile.partitioning.flow import Flow, place
from cpcompile.partitioning.rules.rule import argument_of, as_channels, rules_of


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
    return _plus(flow, node, out, argument_of(node, 2, "bias"))


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
    transposed = bool(argument_of(node, 6, "transposed", False)) if "convolution" in str(node.target) else False
    groups = argument_of(node, 8 if "convolution" in str(node.target) else 6, "groups", 1)
    if transposed or (isinstance(argument_of(node, 4, "padding"), str) and not w.constant) or not w.constant:
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
    bias = flow.value(argument_of(node, 2, "bias"))
    if bias is None:
        return out
    return flow.agree(
        [out, as_channels(bias, out.rank, axis)],
        flow.plain(node.meta["val"]),
        f"{place(node)} adds a bias that keeps it",
    )


def _grouped(flow: Flow, node: fx.Node, x: Value, w: Value, axis: int, groups: int) -> Value:
    """A group of input channels is coupled with its output channels; with one channel per group, each by itself."""
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
    mask = flow.value(argument_of(node, 3, "attn_mask"))
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
        flow.mark_attention(node, ids, scores)
    mixed = _with_length_one(flow.merge(value, [rank - 2], why), rank - 2)
    return flow.agree([_with_length_one(scores, rank - 1), mixed], out, why)


def _repeated(value: Value, heads: int) -> Value:
    """Repeat each key head for its query heads (axis -3)."""
    times = heads // value.shape[-3]
    shape = (*value.shape[:-3], heads, *value.shape[-2:])
    channel_ids = [f if f.shape[-3] == 1 else f.repeat(times, axis=f.ndim - 3) for f in value.channel_ids]
    if value.shape[-3] == 1 and heads > 1:  # one for all: nothing of it belongs to one query head
        return replace(value, shape=shape)
    return replace(value, shape=shape, channel_ids=tuple(channel_ids))


RULES = rules_of(
    linear=(_linear, "linear"),
    matmul=(_matmul, "matmul mm bmm"),
    addmm=(_addmm, "addmm baddbmm"),
    convolution=(_convolution, "conv1d conv2d conv3d convolution"),
    attention=(_attention, "scaled_dot_product_attention"),
)
"""Operator without its overload -> rule."""
