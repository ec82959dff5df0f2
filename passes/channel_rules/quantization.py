"""QuantizeLinear, y = round(x / scale) + zero_point, and DequantizeLinear, x = (y - zero_point) * scale.

Scale and zero point are one number, one per channel of `axis`, or one per block of `block_size` channels.
A stored element equal to the zero point means 0, but only to a DequantizeLinear that has the same zero point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.axes import ONE
from cpcompile.passes.channel_rules.rule import Rule, keep_all, value_of
from cpcompile.passes.channels import Cell, Channels, Zeros
from cpcompile.passes.nodes import constant_of, int_attribute


def _agree(channels: Channels, node: ir.Node) -> None:
    value, out = value_of(node, 0), node.outputs[0]
    settings = [setting for setting in node.inputs[1:3] if setting is not None]
    shape, shapes = channels.shape(value), [channels.shape(setting) for setting in settings]
    if shape is None or channels.shape(out) is None or any(s is None for s in shapes) or len(set(shapes)) > 1:
        keep_all(channels, node, "its shapes are unknown")
        return
    scales, axis = shapes[0] or (), int_attribute(node, "axis", 1) % max(len(shape), 1)
    block = int_attribute(node, "block_size", 0)
    for at, length in enumerate(shape):
        along: list[Cell] = [(value, at), (out, at)]
        if block and len(scales) == len(shape) and at == axis:
            if length.outer or scales[at].outer or length.n != scales[at].n * block:
                keep_all(channels, node, "its last block is not full")
                return
            cells = [*along, *((setting, at) for setting in settings)]
            channels.couple(along, node)
            channels.couple_groups(cells, scales[at].n, node, "a block shares its scale")
        elif block and len(scales) == len(shape):
            channels.couple([*along, *((setting, at) for setting in settings)], node)
        elif len(scales) == 1 and scales != (ONE,) and at == axis:
            channels.couple([*along, *((setting, 0) for setting in settings)], node)
        else:
            channels.couple(along, node)
    if scales in ((), (ONE,)):
        for setting in settings:
            channels.keep(setting, node, "it is one number for all channels")


def _zero_point(node: ir.Node) -> npt.NDArray[np.generic] | None:
    """The zero point, 0 by default; None if it is not constant."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = constant_of(value) if value is not None else None
    return np.zeros((), np.int8) if value is None else None if tensor is None else tensor.numpy()


def _is_zero(point: npt.NDArray[np.generic] | None) -> bool:
    return point is not None and not (point != 0).any()


def _zeros_quantize(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    if channels.shape(node.inputs[0]) is None or not _is_zero(_zero_point(node)):
        return None
    return [channels.zero(value_of(node, 0))]


def _zeros_dequantize(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, point = value_of(node, 0), _zero_point(node)
    shape, maker = channels.shape(value), value.producer()
    if shape is None or point is None:
        return None
    if (tensor := constant_of(value)) is not None:
        stored = tensor.numpy()
        spread = _spread(node, point, stored.shape)
        return None if spread is None else [Zeros.of_constant(stored, spread)]
    if _is_zero(point):
        return [channels.zero(value)]
    if maker is None or maker.op_type != "QuantizeLinear" or channels.shape(maker.inputs[0]) != shape:
        return None
    same = _zero_point(maker)
    aligned = same is not None and same.dtype == point.dtype and np.array_equal(same, point)
    along = [int_attribute(each, "axis", 1) % max(len(shape), 1) for each in (maker, node)]
    return [channels.zero(value_of(maker, 0))] if aligned and (point.size == 1 or along[0] == along[1]) else None


def _spread(node: ir.Node, point: npt.NDArray[np.generic], shape: tuple[int, ...]) -> npt.NDArray[np.generic] | None:
    """The zero point of every element; None where its blocks do not fit."""
    axis = int_attribute(node, "axis", 1) % max(len(shape), 1)
    if point.size == 1:
        return point.reshape(())
    if point.ndim == 1:
        return point.reshape([-1 if at == axis else 1 for at in range(len(shape))])
    block = int_attribute(node, "block_size", 0)
    spread = np.repeat(point, block, axis=axis)
    return spread if spread.shape == shape else None


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "QuantizeLinear": Rule(_agree, _zeros_quantize, data=3),
        "DequantizeLinear": Rule(_agree, _zeros_dequantize, data=3),
    }
)
