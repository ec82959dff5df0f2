"""Convolutions: data (batch, groups * a, ...) becomes (batch, groups * b, ...), every group by weights of its own.

    Conv             weight (groups * b, a, ...)
    ConvTranspose    weight (groups * a, b, ...)

A group goes as a whole if nothing needs its results. The groups that stay need the same size: the first axis of the
weight has its own channels for every group, so each group may lose different ones, but equally many; the second axis
stands for the channels of every group, and all groups lose the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.axes import Axis
from cpcompile.passes.channel_rules.rule import Rule, keep_all, value_of
from cpcompile.passes.channels import NOT_ZERO, Cell, Channels, Mask, Zeros, equal_losses
from cpcompile.passes.nodes import int_attribute


@dataclass(frozen=True)
class _Layout:
    """The axis coupled with the first axis of the weight (`own`), and the one behind its second axis (`shared`)."""

    groups: int
    own: Cell
    shared: Cell


def _layout(channels: Channels, node: ir.Node) -> _Layout | None:
    """The layout of `node`; None if its shapes do not show it."""
    value, weight, out = value_of(node, 0), value_of(node, 1), node.outputs[0]
    a, w, b = channels.shape(value), channels.shape(weight), channels.shape(out)
    if a is None or w is None or b is None or len({len(a), len(w), len(b)}) > 1:
        return None
    groups, pair = int_attribute(node, "group", 1), [((out, 1), b[1]), ((value, 1), a[1])]
    (own, first), (shared, second) = pair[:: -1 if node.op_type == "ConvTranspose" else 1]
    fits = first == w[0] and first.is_static and first.n % groups == 0 and w[1].is_static
    return _Layout(groups, own, shared) if fits and second == Axis((), groups * w[1].n) else None


def _zero_terms(channels: Channels, node: ir.Node, groups: int) -> Mask:
    """Channels of the data that contribute nothing."""
    weight = channels.zero(value_of(node, 1))
    contracted = weight.axes[0] if node.op_type == "ConvTranspose" else np.tile(weight.axes[1], groups)
    return channels.zero(value_of(node, 0)).axes[1] | contracted


def _agree_conv(channels: Channels, node: ir.Node) -> None:
    value, weight, out = value_of(node, 0), value_of(node, 1), node.outputs[0]
    layout = _layout(channels, node)
    if layout is None:
        keep_all(channels, node, "its shapes are unknown")
        return
    for tensor in (value, weight, out):
        channels.keep(tensor, node, "it slides along this axis", axes=range(2, len(channels.shape(tensor) or ())))
    channels.couple([(value, 0), (out, 0)], node)
    groups, own_cells, shared_cells = layout.groups, [layout.own, (weight, 0)], [layout.shared]
    made = own_cells if layout.own[0] is out else shared_cells
    made += [(bias, 0) for bias in node.inputs[2:3] if bias is not None]
    channels.couple(own_cells, node)
    channels.couple(shared_cells, node)
    own, shared = (channels.cut(*cell).reshape(groups, -1) for cell in (layout.own, layout.shared))
    gone = np.asarray(own.all(axis=1) & shared.all(axis=1))
    spared = _zero_terms(channels, node, groups).reshape(groups, -1) | gone[:, None]
    for cells in (own_cells, shared_cells):
        if cells is not made:
            channels.couple(cells, node, limit=spared.reshape(-1), why=NOT_ZERO)
    own, shared = (channels.cut(*cell).reshape(groups, -1) for cell in (layout.own, layout.shared))
    channels.couple(own_cells, node, limit=equal_losses(own, gone).reshape(-1), why="its groups need the same size")
    limit = np.asarray(shared[~gone].all(axis=0))
    channels.couple(
        [(weight, 1)], node, limit=limit, why=NOT_ZERO if groups == 1 else "its groups lose the same channels"
    )
    limit = gone[:, None] | channels.cut(weight, 1)
    channels.couple(shared_cells, node, limit=limit.reshape(-1), why="its groups lose the same channels")


def _zeros_conv(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    weight, out, layout = value_of(node, 1), channels.shape(node.outputs[0]), _layout(channels, node)
    if layout is None or out is None:
        return None
    zeros, groups = channels.zero(weight), layout.groups
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    terms = _zero_terms(channels, node, groups).reshape(groups, -1).all(axis=1)
    masks[1] = np.repeat(terms, out[1].n // groups)
    masks[1] |= np.tile(zeros.axes[1], groups) if node.op_type == "ConvTranspose" else zeros.axes[0]
    for bias in node.inputs[2:3]:
        if bias is not None:
            masks[1] &= channels.zero(bias).axes[0] if channels.shape(bias) is not None else False
    return [Zeros.of(masks)]


def _rewrite_conv(channels: Channels, node: ir.Node) -> None:
    if (layout := _layout(channels, node)) is not None and layout.groups > 1:
        left = ~channels.cut(*layout.own).reshape(layout.groups, -1).all(axis=1)
        node.attributes["group"] = ir.AttrInt64("group", int(left.sum()))


RULES: Mapping[str, Rule] = MappingProxyType(
    dict.fromkeys(("Conv", "ConvTranspose"), Rule(_agree_conv, _zeros_conv, _rewrite_conv, data=3))
)
