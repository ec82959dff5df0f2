"""Whether a mask of attention certainly looks back only, however it is put together.

    mask = (slots < own) & filled | (slots == own)        slots: 0, 1, … total - 1
                                                          own:   those of the last `sequence` tokens

Source: `visible` of our language models, from which exporters make such graphs.
"""

from __future__ import annotations

import onnx_ir as ir

from cpcompile.passes.clean_up import unsliced
from cpcompile.passes.nodes import constant_integer, int_attribute, known_shape, made_by

Length = int | ir.SymbolicDim
FORWARD, BACKWARD, EITHER = ("Less", "LessOrEqual"), ("Greater", "GreaterOrEqual"), ("Equal",)
"""Comparisons of slots with own, of own with slots, and in any order."""
START, DELTA = 0, 2
"""Inputs of a Range."""


def looks_back(mask: ir.Value | None, sequence: Length, total: Length) -> bool:
    """Whether token i of the last `sequence` of `total` looks at none behind itself; `mask` (…, sequence, total)."""
    mask = unsliced(mask)
    node = made_by(mask, "And", "Or", "Unsqueeze", *FORWARD, *BACKWARD, *EITHER)
    if mask is None or node is None or known_shape(mask)[-2:] != (sequence, total):
        return False
    if node.op_type == "Unsqueeze":
        return looks_back(node.inputs[0], sequence, total)
    if node.op_type in ("And", "Or"):
        parts = [looks_back(each, sequence, total) for each in node.inputs]
        return any(parts) if node.op_type == "And" else all(parts)
    first, second = node.inputs
    orders = [(first, second)] * (node.op_type not in BACKWARD) + [(second, first)] * (node.op_type not in FORWARD)
    return any(_counts(slots, total) and _counts_last(own, sequence, total) for slots, own in orders)


def _counts(value: ir.Value | None, length: Length) -> bool:
    """Whether `value` is 0, 1, … length - 1 along its last axis."""
    value = unsliced(value)
    node = made_by(value, "Range", "Unsqueeze")
    if value is None or node is None or known_shape(value)[-1:] != (length,):
        return False
    if node.op_type == "Unsqueeze":
        return _counts(node.inputs[0], length)
    return constant_integer(node.inputs[START]) == 0 and constant_integer(node.inputs[DELTA]) == 1


def _counts_last(value: ir.Value | None, sequence: Length, total: Length) -> bool:
    """Whether `value` (…, sequence, 1) is total - sequence, …, total - 1."""
    node = made_by(value, "Add")
    if value is None or node is None or known_shape(value)[-2:] != (sequence, 1):
        return False
    for counted, offset in (node.inputs, node.inputs[::-1]):
        column, difference = made_by(counted, "Unsqueeze"), made_by(offset, "Sub")
        if column is not None and difference is not None and _counts(column.inputs[0], sequence):
            return [_length(each) for each in difference.inputs] == [total, sequence]
    return False


def _length(value: ir.Value | None) -> Length | None:
    """The length of an axis that the scalar `value` is computed as."""
    node = made_by(value, "Squeeze", "Gather")
    shape = made_by(node.inputs[0], "Shape") if node is not None else None
    if node is None or shape is None or shape.inputs[0] is None:
        return None
    lengths = known_shape(shape.inputs[0])
    lengths = lengths[int_attribute(shape, "start", 0) : int_attribute(shape, "end", len(lengths))]
    index = constant_integer(node.inputs[1]) if node.op_type == "Gather" else 0 if len(lengths) == 1 else None
    return lengths[index] if index is not None and -len(lengths) <= index < len(lengths) else None
