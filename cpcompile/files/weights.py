"""How many parameters a tensor stands for, in whatever form they are stored.

    floating point            its elements, if it has more than one
    8 bits or fewer           its elements; of packed forms (MatMulNBits) those that are packed
    int16, int32              only where an operator reads a quantised weight or bias (DequantizeLinear, QLinearConv)

Scales and zero points are part of the form and no parameters. Operators: ONNX, docs/Operators.md; ONNX Runtime,
docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

FORM: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), (1, 2)),
        **dict.fromkeys(("QLinearConv", "QLinearMatMul"), (1, 2, 4, 5, 6, 7)),
        **dict.fromkeys(("ConvInteger", "MatMulInteger"), (2, 3)),
        "QGemm": (1, 2, 4, 5, 7, 8),
        **dict.fromkeys(("QLinearAdd", "QLinearMul"), (1, 2, 4, 5, 6, 7)),
        "QAttention": (3, 4, 6, 7),
        "DynamicQuantizeMatMul": (2, 3),
        "MatMulIntegerToFloat": (2, 3, 4, 5),
        "MatMulNBits": (2, 3, 4),
        "MatMulBnb4": (2,),
        "GatherBlockQuantized": (2, 3),
    }
)
"""Operator -> its inputs that say how numbers are stored: scales, zero points, orders of groups."""
WIDE: Mapping[str, tuple[int, ...]] = MappingProxyType({"DequantizeLinear": (0,), "QLinearConv": (8,), "QGemm": (6,)})
"""Operator -> its inputs that are parameters even as wide integers."""


def parameters_in(tensor: ir.TensorProtocol, value: ir.Value | None) -> int:
    """The parameters that `tensor` stands for, given the value that nodes read it as, if there is one."""
    uses = [(node, index) for node, index in value.uses()] if value is not None else []
    if tensor.size < 2 or (uses and all(_is_form(*use) for use in uses)):
        return 0
    if tensor.dtype.is_floating_point():
        return tensor.size
    if not tensor.dtype.is_integer():
        return 0
    if tensor.dtype.bitwidth <= 8:
        return max((_unpacked(node, index, tensor) for node, index in uses), default=tensor.size)
    return tensor.size if any(index in WIDE.get(node.op_type, ()) for node, index in uses) else 0


def _unpacked(node: ir.Node, index: int, tensor: ir.TensorProtocol) -> int:
    """The elements of the tensor that `node` makes of what it reads."""
    if node.op_type in ("MatMulNBits", "MatMulBnb4") and index == 1:
        return _number(node, "K", 0) * _number(node, "N", 0) or tensor.size
    if node.op_type == "GatherBlockQuantized" and index == 0 and tensor.dtype.bitwidth == 8:
        return tensor.size * 8 // _number(node, "bits", 4)
    return tensor.size


def _is_form(node: ir.Node, index: int) -> bool:
    """Whether input `index` says how numbers are stored, as the scale does that dynamic quantisation multiplies."""
    if index in FORM.get(node.op_type, ()):
        return True
    other = node.inputs[1 - index] if node.op_type == "Mul" and index < 2 else None
    maker = None if other is None else other.producer()
    return maker is not None and maker.op_type == "DynamicQuantizeLinear" and other is maker.outputs[1]


def _number(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
