"""Rotate queries and keys by their positions in one node, in place of seven.

x * cos + Concat(-right, left) * sin  ->  RotaryEmbedding(x, left of cos, left of sin)      x = Concat(left, right)

The two halves of cos have to be equal, and those of sin.
Source: ONNX operator RotaryEmbedding-23.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir

from cpcompile.files.onnx_file import opset_of
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import (
    add_constant,
    both_orders,
    constant_integer,
    constant_of,
    int_attribute,
    known_shape,
    made_by,
    optional_input,
)

OPSET = 23
"""The first with RotaryEmbedding."""
TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""What it takes."""
HEADS, CHANNELS, RANK = 1, 3, 4
"""Axes of what is rotated: (batch, heads, sequence, channels)."""
START, AXIS, STEP = 1, 3, 4
"""Inputs of a Slice."""


@dataclass(frozen=True)
class RotaryEmbedding(GraphPass):
    """Use the operator of the standard; shapes have to be known, and models in older opsets stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`."""
        nodes = list(model.graph) if opset_of(model.graph) >= OPSET else []
        rotations = {node: found for node in nodes if (found := _rotation(node)) is not None}
        halves: dict[ir.Value, ir.Value] = {}
        for node, (x, *tables) in rotations.items():
            node.op_type = "RotaryEmbedding"
            node.resize_inputs(3)
            for index, value in enumerate([x, *(_left_half(model.graph, each, halves) for each in tables)]):
                node.replace_input_with(index, value)
        if rotations:
            CleanUp(frozenset(model.graph.initializers))(model)
        return ir.passes.PassResult(model, bool(rotations))


def _rotation(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x, cos and sin, if `node` adds up x * cos + turned * sin."""
    if made_by(node.outputs[0], "Add") is None:
        return None
    terms = [term for value in node.inputs if (term := made_by(value, "Mul")) is not None]
    for one, other in (terms, terms[::-1]) if len(terms) == 2 else ():
        for (x, cos), (turned, sin) in product(both_orders(one), both_orders(other)):
            if _is_turned(turned, x) and _fits(cos, x) and _fits(sin, x):
                return x, cos, sin
    return None


def _is_turned(value: ir.Value, x: ir.Value) -> bool:
    """Whether `value` is the right half of `x`, negated, in front of its left half."""
    concat = made_by(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or int_attribute(concat, "axis", 0) not in (CHANNELS, -1):
        return False
    negated = made_by(concat.inputs[0], "Neg")
    return negated is not None and _is_half(negated.inputs[0], x, 1) and _is_half(concat.inputs[1], x, 0)


def _is_half(value: ir.Value | None, x: ir.Value, which: int) -> bool:
    """Whether `value` is the left (0) or right (1) half of the channels of `x` (batch, heads, sequence, channels)."""
    node = made_by(value, "Split", "Slice")
    if value is None or node is None or node.inputs[0] is not x or value.shape is None:
        return False
    shape, half = known_shape(x), value.shape[-1]
    if len(shape) != RANK or not isinstance(half, int) or shape[CHANNELS] != 2 * half:
        return False
    if node.op_type == "Split":
        return len(node.outputs) == 2 and int_attribute(node, "axis", 0) in (CHANNELS, -1) and value.index() == which
    start, axis, step = (optional_input(node, index) for index in (START, AXIS, STEP))
    along = constant_integer(axis) in (CHANNELS, -1) and (step is None or constant_integer(step) == 1)
    return along and constant_integer(start) in ((0,), (half, -half))[which]


def _fits(table: ir.Value, x: ir.Value) -> bool:
    """Whether `table` is (batch, 1, sequence, channels) with two equal halves."""
    shape = known_shape(x)
    if len(shape) != RANK or table.dtype != x.dtype or x.dtype not in TYPES:
        return False
    batch, _, sequence, channels = shape
    return known_shape(table) == (batch, 1, sequence, channels) and _repeats(table, channels)


def _repeats(value: ir.Value | None, channels: int | ir.SymbolicDim) -> bool:
    """Whether the last axis, of that length, is certainly the same half twice."""
    node = None if value is None else made_by(value, "Concat", "Cos", "Sin", "Cast", "Unsqueeze", "Mul")
    if value is None or node is None or value.shape is None or value.shape[-1] != channels:
        return False
    if node.op_type == "Concat":
        last = (-1, len(value.shape) - 1)
        return int_attribute(node, "axis", 0) in last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    if node.op_type == "Mul":  # by one number
        numbers = {other: constant_of(other) for other, _ in both_orders(node)}
        return any(
            (number := numbers[other]) is not None and number.size == 1 and _repeats(table, channels)
            for table, other in both_orders(node)
        )
    return _repeats(node.inputs[0], channels)


def _left_half(graph: ir.Graph, table: ir.Value, made: dict[ir.Value, ir.Value]) -> ir.Value:
    """(batch, sequence, half of the channels) of `table` (batch, 1, sequence, channels); made once, and remembered."""
    if table not in made:
        producer = table.producer()
        assert producer is not None and table.shape is not None
        batch, _, sequence, channels = table.shape
        assert isinstance(channels, int)
        constants = {"start": [0], "end": [channels // 2], "axis": [CHANNELS], "heads": [HEADS]}
        start, end, axis, heads = (
            add_constant(graph, f"{table.name}.{name}", np.array(number)) for name, number in constants.items()
        )
        cut = ir.node("Slice", [table, start, end, axis])
        squeezed = ir.node("Squeeze", [cut.outputs[0], heads])
        graph.insert_after(producer, [cut, squeezed])
        cut.outputs[0].name, squeezed.outputs[0].name = f"{table.name}.left", f"{table.name}.half"
        made[table] = squeezed.outputs[0]
        made[table].type, made[table].shape = table.type, ir.Shape([batch, sequence, channels // 2])
    return made[table]
