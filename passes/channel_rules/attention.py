"""Attention and RotaryEmbedding (opset 23): they lose whole heads.

    4-D    (batch, heads, sequence, head_dim)
    3-D    (batch, sequence, heads * head_dim), with the number of heads as an attribute

A key and value head serves a group of query heads and goes with the last of them; groups that stay have to stay of one
size. Caches (past and present keys and values, always 4-D) are coupled with the key heads: usually they are inputs and
outputs of the model, with a shape that the caller relies on, and then every head stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.axes import ONE, Axis
from cpcompile.passes.channel_rules.rule import Rule, keep_all, value_of
from cpcompile.passes.channels import Cell, Channels, Zeros, equal_losses, reason_of
from cpcompile.passes.nodes import int_attribute

_QUERY = "a query head of the group has to stay"
_GROUP = "another head of its group has to stay"
_SEQUENCE = "attention works along the sequence"


def _heads(channels: Channels, node: ir.Node, value: ir.Value, attribute: str) -> tuple[Cell, int] | None:
    """The axis that holds the heads of `value`, and their number."""
    shape = channels.shape(value)
    if shape is None or len(shape) not in (3, 4):
        return None
    axis = 1 if len(shape) == 4 else 2
    heads = shape[1].n if axis == 1 else int_attribute(node, attribute, 0)
    return ((value, axis), heads) if heads and shape[axis].is_static and shape[axis].n % heads == 0 else None


def _present(values: Sequence[ir.Value | None]) -> list[ir.Value]:
    return [value for value in values if value is not None]


def _agree_attention(channels: Channels, node: ir.Node) -> None:
    query, key, value, out = *(value_of(node, index) for index in range(3)), node.outputs[0]
    key_caches, value_caches = (
        _present([*node.inputs[4 + at : 5 + at], *node.outputs[1 + at : 2 + at]]) for at in (0, 1)
    )
    scores, masks = list(node.outputs[3:4]), _present(node.inputs[3:4])
    by_query = [_heads(channels, node, tensor, "q_num_heads") for tensor in (query, out)]
    by_key = [_heads(channels, node, tensor, "kv_num_heads") for tensor in (key, value)]
    ranks = {len(channels.shape(tensor) or ()) for tensor in (query, key, value, out)}
    four = [len(channels.shape(tensor) or ()) == 4 for tensor in (*key_caches, *value_caches, *scores)]
    heads, groups = {h[1] for h in by_query if h}, {h[1] for h in by_key if h}
    if None in (*by_query, *by_key) or {len(ranks), len(heads), len(groups)} != {1} or not all(four):
        keep_all(channels, node, "its shapes do not show where its heads are")
        return
    ((number,), (key_number,)) = heads, groups
    per_head = _mask_cells(channels, masks, number)
    if per_head is None or number % key_number:
        keep_all(channels, node, "the heads of its mask are unknown")
        return
    query_cells = [*(h[0] for h in by_query if h), *per_head, *((tensor, 1) for tensor in scores)]
    key_cells = [*(h[0] for h in by_key if h), *((cache, 1) for cache in (*key_caches, *value_caches))]
    if ranks == {4}:  # within a head only those of the values may go: they are not summed over
        channels.couple([(tensor, 3) for tensor in (value, out, *value_caches)], node)
        for tensor in (query, key):
            channels.keep(tensor, node, "the head dimension scales the scores", axes=[3])
    for tensor in (query, key, value, out, *masks, *scores, *key_caches, *value_caches):
        spoken = {axis for cell_of, axis in (*query_cells, *key_cells) if cell_of is tensor}
        if ranks == {4} and tensor not in (*masks, *scores, *key_caches):
            spoken.add(3)
        others = [axis for axis in range(len(channels.shape(tensor) or ())) if axis not in spoken]
        channels.keep(tensor, node, _SEQUENCE, axes=others)
    _agree_heads(channels, node, (query_cells, number), (key_cells, key_number))


def _mask_cells(channels: Channels, masks: Sequence[ir.Value], heads: int) -> list[Cell] | None:
    """The axis of each mask that holds heads, if it has one; None if that is not known."""
    cells: list[Cell] = []
    for mask in masks:
        shape = channels.shape(mask)
        if shape is None or shape[-3:-2] not in ((), (ONE,), (Axis((), heads),)):
            return None
        cells += [(mask, len(shape) - 3)] if heads > 1 and shape[-3:-2] == (Axis((), heads),) else []
    return cells


def _agree_heads(
    channels: Channels, node: ir.Node, queries: tuple[list[Cell], int], keys: tuple[list[Cell], int]
) -> None:
    """A key head goes with its group of queries, and all groups that stay lose the same number of heads."""
    for cells, number in (queries, keys):
        channels.couple_groups(cells, number, node, "the rest of its head has to stay")
    groups = keys[1]
    dead = np.asarray(channels.cut(*queries[0][0]).reshape(groups, queries[1] // groups, -1).all(axis=2))
    gone = np.asarray(channels.cut(*keys[0][0]).reshape(groups, -1).all(axis=1) & dead.all(axis=1))
    left = equal_losses(dead, gone).reshape(-1)
    # What keeps the key head keeps its queries, unless it is one of them.
    blame = channels.reasons(keys[0][0]).reshape(groups, -1)[:, 0].copy()
    blame[[reason is None or reason.text == _QUERY for reason in blame]] = reason_of(node, _GROUP)
    for cells, limit, reasons in (
        (keys[0], gone, np.full(groups, reason_of(node, _QUERY), dtype=np.object_)),
        (queries[0], left, np.repeat(blame, left.size // groups)),
    ):
        for cell in cells:
            size = channels.cut(*cell).size // limit.size
            channels.shrink(cell, np.repeat(limit, size), np.repeat(reasons, size))


def _zeros_attention(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    """A head whose values are zero, now and in the cache, makes zeros."""
    value, out = value_of(node, 2), channels.shape(node.outputs[0])
    found, made = (
        _heads(channels, node, tensor, name)
        for tensor, name in ((value, "kv_num_heads"), (node.outputs[0], "q_num_heads"))
    )
    past = _present(node.inputs[5:6])
    if out is None or found is None or made is None or made[1] % found[1]:
        return None
    if any(len(channels.shape(cache) or ()) != 4 for cache in past):
        return None
    zeros, groups = channels.zero(value), found[1]
    heads = zeros.axes[found[0][1]].reshape(groups, -1)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    for cache in map(channels.zero, past):
        heads = heads & (cache.axes[1][:, None] | (cache.axes[3] if heads.shape[1] > 1 else False))
    masks[made[0][1]] = np.repeat(heads, made[1] // groups, axis=0).reshape(-1)
    if len(out) == 4:
        masks[3] = np.logical_and.reduce([channels.zero(tensor).axes[3] for tensor in (value, *past)])
    return [Zeros.of(masks, everything=all(channels.zero(tensor).everything for tensor in (value, *past)))]


def _rewrite_attention(channels: Channels, node: ir.Node) -> None:
    _rewrite_number(channels, node, value_of(node, 0), "q_num_heads")
    _rewrite_number(channels, node, value_of(node, 1), "kv_num_heads")


def _rewrite_number(channels: Channels, node: ir.Node, value: ir.Value, attribute: str) -> None:
    if (found := _heads(channels, node, value, attribute)) is not None and attribute in node.attributes:
        left = ~channels.cut(*found[0]).reshape(found[1], -1).all(axis=1)
        node.attributes[attribute] = ir.AttrInt64(attribute, int(left.sum()))


def _agree_rotary(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    found = _heads(channels, node, value, "num_heads")
    if found is None or channels.shape(out) is None:
        keep_all(channels, node, "its shapes do not show where its heads are")
        return
    (_, axis), heads = found
    for tensor in (value, out):
        others = [other for other in range(len(channels.shape(tensor) or ())) if other != axis]
        channels.keep(tensor, node, "it rotates along this axis", axes=others)
    channels.couple_groups([(value, axis), (out, axis)], heads, node, "it rotates the channels of a head")


def _zeros_rotary(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    found, out = _heads(channels, node, value_of(node, 0), "num_heads"), channels.shape(node.outputs[0])
    if found is None or out is None:
        return None
    (value, axis), heads = found
    masks = [np.zeros(length.n, dtype=np.bool_) for length in out]
    runs = channels.zero(value).axes[axis].reshape(heads, -1)
    masks[axis] = np.repeat(runs.all(axis=1), runs.shape[1])
    return [Zeros.of(masks, everything=channels.zero(value).everything)]


def _rewrite_rotary(channels: Channels, node: ir.Node) -> None:
    _rewrite_number(channels, node, value_of(node, 0), "num_heads")


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Attention": Rule(_agree_attention, _zeros_attention, _rewrite_attention, data=6),
        "RotaryEmbedding": Rule(_agree_rotary, _zeros_rotary, _rewrite_rotary),
    }
)
