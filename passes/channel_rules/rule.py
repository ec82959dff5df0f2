"""What a rule says about an operator, and what every rule needs.

    zeros(channels, node)    which slices of its outputs are zero, given those of its inputs
    agree(channels, node)    which channels of inputs and outputs can only be cut together, or not at all
    rewrite(channels, node)  what else changes once they are cut: sizes, indices, shapes

Assumes finite values: 0 * x is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from cpcompile.passes.axes import Axis, Shape
from cpcompile.passes.channels import Channels, Zeros

ZerosRule = Callable[[Channels, ir.Node], Sequence[Zeros] | None]
AgreeRule = Callable[[Channels, ir.Node], None]
RewriteRule = Callable[[Channels, ir.Node], None]


def _nothing(_channels: Channels, _node: ir.Node) -> None:
    return None


@dataclass(frozen=True)
class Rule:
    """The behaviour of one operator; its first `data` inputs carry channels, the others are settings."""

    agree: AgreeRule
    zeros: ZerosRule = _nothing
    rewrite: RewriteRule = _nothing
    data: int = 1


def keep_all(channels: Channels, node: ir.Node, why: str) -> None:
    """Nothing that `node` reads or makes can be cut."""
    for value in (*node.inputs, *node.outputs):
        channels.keep(value, node, why)


def value_of(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator requires."""
    value = node.inputs[index]
    assert value is not None
    return value


def remaining(channels: Channels, value: ir.Value) -> Shape:
    """The shape of `value` once its channels are cut."""
    shape = channels.shape(value)
    assert shape is not None
    return tuple(Axis(axis.outer, int((~channels.cut(value, i)).sum())) for i, axis in enumerate(shape))
