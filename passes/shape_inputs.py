"""Rewrite the integer inputs of Reshape, Expand, Split, Slice and Gather.

Every node gets constants of its own, because nodes that shared one may now need different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.files.onnx_file import opset_of
from cpcompile.passes.axes import Axis, Shape
from cpcompile.passes.nodes import add_constant, int_attribute
from cpcompile.passes.symbolic_shapes import ShapeTable

ZERO = Axis((), 0)


def set_integers(node: ir.Node, index: int, numbers: npt.ArrayLike) -> None:
    """Make input `index` of `node` a constant of its own, of the integer type that it had."""
    before = node.inputs[index] if index < len(node.inputs) else None
    known = before is not None and before.dtype == ir.DataType.INT32
    array = np.asarray(numbers, dtype=np.int32 if known else np.int64)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, _constant(node, f"input{index}", array))


def pick_channels(node: ir.Node, axis: int, indices: npt.NDArray[np.intp], shape: Shape) -> Shape:
    """Let `node` read only these channels of its first input, which has this `shape`; returns the new one."""
    value = node.inputs[0]
    assert value is not None
    picked = _constant(node, "picked", np.asarray(indices, dtype=np.int64))
    gather = ir.node("Gather", [value, picked], {"axis": axis})
    out, graph = gather.outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    name = f"{node.outputs[0].name}.channels"
    again = (value.name or "").startswith(name)
    out.name, out.type = f"{value.name}.{axis}" if again else name, value.type
    picks = (*shape[:axis], Axis((), indices.size), *shape[axis + 1 :])
    out.shape = ir.Shape(length.dimension for length in picks)
    graph.insert_before(node, gather)
    node.replace_input_with(0, out)
    return picks


Piece = int | tuple[ir.Value, int]
"""One number of a target shape: known, or the length of an axis of a value."""


def plan_target_shape(node: ir.Node, source: Shape, target: Shape, table: ShapeTable) -> list[Piece] | None:
    """How to write the shape input of a Reshape or Expand from `source` to `target`; None if that is not possible.

    Known lengths are constants; a dynamic axis is copied in place (Reshape: 0, Expand: 1), inferred
    (-1, once), or read from a value that has it.
    """
    expands = node.op_type == "Expand"
    if ZERO in target:
        return None  # a length of 0 and a copied one look the same
    pieces: list[Piece] = []
    offset = len(target) - len(source)
    for at, axis in enumerate(target):
        in_place = at - offset if expands else at
        same = 0 <= in_place < len(source) and axis == source[in_place]
        if same and expands:
            pieces.append(1)
        elif axis.is_static:
            pieces.append(axis.n)
        elif same:
            pieces.append(0)
        elif not expands and -1 not in pieces:
            pieces.append(-1)
        elif (found := _find_axis(node, axis, source, table)) is not None:
            pieces.append(found)
        else:
            return None
    return pieces


def set_target_shape(node: ir.Node, pieces: Sequence[Piece], table: ShapeTable) -> bool:
    """Write the shape input of a Reshape or Expand; False if it has these pieces already."""
    if all(isinstance(piece, int) for piece in pieces):
        wanted = [piece for piece in pieces if isinstance(piece, int)]
        if table.integers(node.inputs[1]) == wanted:
            return False
        set_integers(node, 1, wanted)
        node.attributes.pop("allowzero", None)  # a 0 copies the length, which is the default
        return True
    if _written_pieces(node, table) == list(pieces):
        return False
    parts = []
    for at, piece in enumerate(pieces):
        if isinstance(piece, int):
            parts.append(_constant(node, f"shape{at}", np.asarray([piece], dtype=np.int64)))
        else:
            value, axis_index = piece
            shape = ir.node("Shape", [value], {"start": axis_index, "end": axis_index + 1})
            parts.append(_insert(node, shape, f"shape{at}", 1))
    joined = _insert(node, ir.node("Concat", parts, {"axis": 0}), "shape", len(parts))
    node.replace_input_with(1, joined)
    node.attributes.pop("allowzero", None)
    return True


def _written_pieces(node: ir.Node, table: ShapeTable) -> list[Piece] | None:
    """The pieces of a target shape that `set_target_shape` wrote; None for any other."""
    target = node.inputs[1]
    concat = None if target is None else target.producer()
    if concat is None or concat.op_type != "Concat":
        return None
    pieces: list[Piece] = []
    for part in concat.inputs:
        shape = None if part is None else part.producer()
        number = table.integers(part)
        if number is not None and len(number) == 1:
            pieces.append(number[0])
        elif shape is not None and shape.op_type == "Shape" and shape.inputs[0] is not None:
            start = int_attribute(shape, "start", 0)
            if int_attribute(shape, "end", -1) != start + 1:
                return None
            pieces.append((shape.inputs[0], start))
        else:
            return None
    return pieces


def _find_axis(node: ir.Node, axis: Axis, source: Shape, table: ShapeTable) -> tuple[ir.Value, int] | None:
    """A value that is there before `node` and has this dynamic axis: a graph input or the node's own."""
    graph = node.graph
    if not isinstance(graph, ir.Graph) or opset_of(graph) < 15:
        return None  # Shape of one axis came with opset 15
    for value, shape in (*((value, table.shape(value)) for value in graph.inputs), (node.inputs[0], source)):
        if value is not None and shape is not None and axis in shape:
            return value, shape.index(axis)
    return None


def _constant(node: ir.Node, suffix: str, array: npt.NDArray[Any]) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return add_constant(graph, unique_name(graph, f"{node.outputs[0].name}.{suffix}"), array)


def _insert(node: ir.Node, new: ir.Node, suffix: str, length: int) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    out = new.outputs[0]
    out.name = f"{node.outputs[0].name}.{suffix}"
    out.type, out.shape = ir.TensorType(ir.DataType.INT64), ir.Shape((length,))
    graph.insert_before(node, new)
    return out


def unique_name(graph: ir.Graph, name: str) -> str:
    """`name`, with a number appended if an initializer has it already."""
    candidate, number = name, 1
    while candidate in graph.initializers:
        candidate, number = f"{name}.{number}", number + 1
    return candidate
