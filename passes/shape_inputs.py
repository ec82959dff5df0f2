"""Write the integer inputs of Reshape, Expand, Split, Slice and Gather anew.

Every node gets constants of its own, so that nodes that shared one can part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.symbolic_shapes import ONE, Axis, Shape, ShapeTable


def set_integers(node: ir.Node, index: int, numbers: Sequence[int], *, scalar: bool = False) -> None:
    """Make input `index` of `node` a constant of its own."""
    array = np.asarray(numbers[0] if scalar else numbers, dtype=np.int64)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, _constant(node, f"input{index}", array))


def set_target_shape(node: ir.Node, source: Shape, target: Shape, table: ShapeTable) -> None:
    """Make the shape input of a Reshape or Expand from `source` to `target` explicit.

    Known lengths are constants; a dynamic axis is copied in place (Reshape: 0, Expand: 1), inferred
    (-1, once), or read from a value that has it. Left as it is where none of that is possible.
    """
    expands = node.op_type == "Expand"
    pieces: list[int | tuple[ir.Value, int]] = []
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
        elif (found := _find_axis(node, axis, table)) is not None:
            pieces.append(found)
        else:
            return
    if all(isinstance(piece, int) for piece in pieces):
        wanted = [piece for piece in pieces if isinstance(piece, int)]
        if table.integers(node.inputs[1]) != wanted:
            set_integers(node, 1, wanted)
            node.attributes.pop("allowzero", None)  # a 0 copies the length, which is the default
        return
    graph = node.graph
    assert graph is not None
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


def _find_axis(node: ir.Node, axis: Axis, table: ShapeTable) -> tuple[ir.Value, int] | None:
    """A value that is there before `node` and has this dynamic axis: a graph input or the node's own."""
    graph = node.graph
    inputs = graph.inputs if isinstance(graph, ir.Graph) else ()
    for value in (*inputs, node.inputs[0]):
        for index, candidate in enumerate(table.shape(value) or ()):
            if value is not None and candidate == axis and candidate != ONE:
                return value, index
    return None


def _constant(node: ir.Node, suffix: str, array: npt.NDArray[np.int64]) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    name = _free_name(graph, f"{node.outputs[0].name}.{suffix}")
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def _insert(node: ir.Node, new: ir.Node, suffix: str, length: int) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    out = new.outputs[0]
    out.name = f"{node.outputs[0].name}.{suffix}"
    out.type, out.shape = ir.TensorType(ir.DataType.INT64), ir.Shape((length,))
    graph.insert_before(node, new)
    return out


def _free_name(graph: ir.Graph, name: str) -> str:
    """`name`, or with a number if an initializer has it already."""
    candidate, number = name, 1
    while candidate in graph.initializers:
        candidate, number = f"{name}.{number}", number + 1
    return candidate
