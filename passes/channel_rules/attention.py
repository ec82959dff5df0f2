"""Attention (opset 23): query (batch, heads, sequence, head_dim), key and value with as many or fewer heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.rule import Rule, keep_all, value_of
from cpcompile.passes.channels import Channels, Zeros
from cpcompile.passes.symbolic_shapes import ONE


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
    if heads % groups or mask_heads not in ((), (ONE,)):
        for tensor in (query, key, value, out):
            channels.keep(tensor, node, "its mask has heads of its own", axes=[1])
        return
    per_group = heads // groups
    both = (channels.cut(query, 1) & channels.cut(out, 1)).reshape(groups, per_group)
    whole = np.asarray(both.all(axis=1))
    channels.tie([(key, 1), (value, 1)], node, limit=whole, why="a query head of the group has to stay")
    group_cut = np.repeat(channels.cut(key, 1), per_group)
    channels.tie([(query, 1), (out, 1)], node, limit=group_cut, why="another head of its group has to stay")


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
        "Attention": Rule(_agree_attention, _zeros_attention, data=3),
    }
)
