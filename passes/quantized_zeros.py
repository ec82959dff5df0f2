"""Zero channels of quantised weights whose operators have no rule: they stay, and a report can say so.

A stored element means zero where it equals its zero point. Operators: ONNX, docs/Operators.md; ONNX Runtime,
docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.channels import Mask
from cpcompile.passes.nodes import constant_of, int_attribute

WEIGHTS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "MatMulInteger": (1, 3, -1),
        "ConvInteger": (1, 3, 0),
        "QLinearMatMul": (3, 5, -1),
        "QLinearConv": (3, 5, 0),
        "DynamicQuantizeMatMul": (1, 3, -1),
        "MatMulIntegerToFloat": (1, 5, -1),
    }
)
"""Operator -> its inputs for the weight and the zero points of the weight, and the axis along which these lie."""


def stuck_zeros(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, int, int]]:
    """Node, weight, axis and number of zero channels; of packed weights, axis 0 are the rows and 1 the columns."""
    for node in graph.all_nodes():
        weight, zero = _zero_elements(node)
        for axis in range(zero.ndim) if weight is not None else ():
            others = tuple(other for other in range(zero.ndim) if other != axis)
            if weight is not None and (count := int(zero.all(axis=others).sum())):
                yield node, weight, axis, count


def _zero_elements(node: ir.Node) -> tuple[ir.Value | None, Mask]:
    """The weight that `node` reads, and which of its elements mean zero; no weight if that is not known."""
    nothing = np.zeros(0, dtype=np.bool_)
    index, points, axis = (1, 3, 0) if node.op_type == "MatMulNBits" else WEIGHTS.get(node.op_type, (0, 0, 0))
    weight = node.inputs[index] if index and index < len(node.inputs) else None
    given = node.inputs[points] if weight is not None and points < len(node.inputs) else None
    stored, point = (None if value is None else constant_of(value) for value in (weight, given))
    if stored is None or (given is not None and point is None):
        return None, nothing
    array, zero = stored.numpy(), None if point is None else point.numpy()
    if node.op_type == "MatMulNBits":
        unpacked = _unpack(node, array, zero)
        return (weight, unpacked) if unpacked is not None else (None, nothing)
    spread = np.zeros((), array.dtype) if zero is None else zero
    if spread.ndim == 1 and spread.size > 1:
        spread = spread.reshape([-1 if at == axis % array.ndim else 1 for at in range(array.ndim)])
    return weight, np.asarray(array == spread)


def _unpack(node: ir.Node, packed: npt.NDArray[np.generic], points: npt.NDArray[np.generic] | None) -> Mask | None:
    """Which elements (rows, columns) of the weight of a MatMulNBits mean zero; None for a form that is not known.

    packed: (rows, blocks, bytes of a block), the first element in the lowest bits; points: a number per row and block,
    packed in the same way, by default the middle of the range.
    """
    bits, rows, columns = (int_attribute(node, name, default) for name, default in (("bits", 4), ("N", 0), ("K", 0)))
    block = int_attribute(node, "block_size", 0)
    if bits not in (2, 4, 8) or packed.dtype != np.uint8 or not rows or not block or packed.size % rows:
        return None
    numbers = _split(packed.reshape(rows, -1), bits)
    blocks = numbers.shape[1] // block
    if points is None:
        zero = np.full((rows, blocks), 1 << (bits - 1))
    elif points.dtype == np.uint8 and points.size % rows == 0:
        zero = _split(points.reshape(rows, -1), bits)[:, :blocks]
    else:
        return None
    return np.asarray(numbers == np.repeat(zero, block, axis=1))[:, :columns]


def _split(bytes_: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.int64]:
    """The numbers of so many bits in every row, the lowest bits of a byte first."""
    parts = [(bytes_.astype(np.int64) >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(bytes_.shape[0], -1)
