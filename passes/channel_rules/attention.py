"""Attention (opset 23): query (batch, heads, sequence, head_dim), key and value with as many or fewer heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.rule import Rule, keep_all, value_of
from cpcompile.passes.channels import Cell, Channels, Zeros
from cpcompile.passes.symbolic_shapes import ONE, Axis


def _agree_attention(channels: Channels, node: ir.Node) -> None:
    query, key, value, out = value_of(node, 0), value_of(node, 1), value_of(node, 2), node.outputs[0]
    shapes = [channels.shape(v) for v in (query, key, value, out)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        keep_all(channels, node, "only heads on an axis of their own are understood")
        return
    if any(extra is not None for extra in (*node.inputs[4:], *node.outputs[1:])):
        keep_all(channels, node, "heads of caches are not understood")
        return
    for tensor in (query, key, value, out):
        channels.keep(tensor, node, "attention works along the sequence", axes=[0, 2])
    channels.keep(query, node, "the head dimension scales the scores", axes=[3])
    channels.keep(key, node, "the head dimension scales the scores", axes=[3])
    channels.tie([(value, 3), (out, 3)], node)
    heads, groups = channels.cut(query, 1).size, channels.cut(key, 1).size
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    mask_heads = (channels.shape(mask) or (None,) * 3)[-3:-2] if mask is not None else ()
    with_queries: list[Cell] = [(query, 1), (out, 1)]
    if mask is not None and mask_heads == (Axis((), heads),):
        rank = len(channels.shape(mask) or ())
        with_queries.append((mask, rank - 3))
        channels.keep(mask, node, "attention works along the sequence", axes=[a for a in range(rank) if a != rank - 3])
    elif mask_heads in ((), (ONE,)):
        channels.keep(mask, node, "attention works along the sequence")
    else:
        groups = 0
    if not groups or heads % groups:
        keep_all(channels, node, "heads of its mask are not understood")
        return
    channels.tie(with_queries, node)
    if groups == 1:
        return  # one key head serves whatever queries are left
    per_group = heads // groups
    whole = np.asarray(channels.cut(query, 1).reshape(groups, per_group).all(axis=1))
    channels.tie([(key, 1), (value, 1)], node, limit=whole, why="a query head of the group has to stay")
    group_cut = np.repeat(channels.cut(key, 1), per_group)
    channels.tie(with_queries, node, limit=group_cut, why="another head of its group has to stay")


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


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Attention": Rule(_agree_attention, _zeros_attention, data=4),
    }
)
