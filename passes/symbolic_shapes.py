"""Shapes with dynamic axes, as exact products (see `axes`).

Small integer vectors (results of Shape, Slice, Concat, … that feed Reshape and Expand) have symbolic values: vectors
of such axes. `ShapeTable` holds the shapes and symbolic values of a graph, as `shape_rules` infers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from cpcompile.passes.axes import Axis, Shape
from cpcompile.passes.nodes import constant_of, int_attribute


@dataclass
class ShapeTable:
    """Symbolic shapes of all values of a graph and its subgraphs, and symbolic values of its small integer vectors."""

    shapes: dict[ir.Value, Shape | None] = field(default_factory=dict)
    symbolic_values: dict[ir.Value, Shape] = field(default_factory=dict)

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The axes of `value`; None if not even their number is known."""
        if value is None:
            return None
        if value not in self.shapes:
            tensor = constant_of(value)
            shape = value.shape if tensor is None else tensor.shape
            self.shapes[value] = None if shape is None else tuple(_axis(value, i, d) for i, d in enumerate(shape))
        return self.shapes[value]

    def narrow(self, value: ir.Value, shape: Shape) -> None:
        """Give `value` this shape, which is broadcast where it is read."""
        self.shapes[value] = shape
        value.shape = ir.Shape(axis.dimension for axis in shape)

    def symbolic_value(self, value: ir.Value | None) -> Shape | None:
        """The elements of an integer vector or scalar, each as a product; None if they are not known."""
        if value is None:
            return None
        if value not in self.symbolic_values:
            tensor = constant_of(value)
            if tensor is None or tensor.size > 64 or not tensor.dtype.is_integer() or len(tensor.shape) > 1:
                return None
            self.symbolic_values[value] = tuple(Axis((), int(number)) for number in tensor.numpy().reshape(-1))
        return self.symbolic_values[value]

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """The elements of a constant integer vector or scalar; None if they are not known."""
        elements = self.symbolic_value(value)
        return [axis.n for axis in elements] if elements is not None and all(a.is_static for a in elements) else None


def _axis(value: ir.Value, index: int, dimension: object) -> Axis:
    if isinstance(dimension, int) and dimension >= 0:
        return Axis((), dimension)
    name = getattr(dimension, "value", None)
    return Axis((str(name) if name is not None else f"?{value.name}.{index}",), 1)


def axes_of(table: ShapeTable, node: ir.Node, rank: int, index: int = 1) -> list[int] | None:
    """The operator's `axes`, an attribute in old opsets and an input in new ones, as numbers from 0."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        axes: Sequence[int] | None = attribute.as_ints()
    elif len(node.inputs) > index and node.inputs[index] is not None:
        axes = table.integers(node.inputs[index])
    else:
        axes = range(rank)
    return None if axes is None else [axis % rank for axis in axes]


def axes_left(table: ShapeTable, node: ir.Node) -> dict[int, int] | None:
    """Axes of the input that a reduction leaves -> axes of its output; None if they are not known."""
    shape = table.shape(node.inputs[0])
    axes = axes_of(table, node, len(shape)) if shape is not None else None
    if shape is None or axes is None:
        return None
    explicit = "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)
    if not (explicit and axes):
        axes = [] if int_attribute(node, "noop_with_empty_axes", 0) else list(range(len(shape)))
    left = [axis for axis in range(len(shape)) if axis not in axes]
    return {axis: axis if int_attribute(node, "keepdims", 1) else at for at, axis in enumerate(left)}


def padding_of(table: ShapeTable, node: ir.Node) -> list[tuple[int, int]] | None:
    """Per axis how much a Pad puts before and after it; None if that is not constant."""
    shape, pads = table.shape(node.inputs[0]), table.integers(node.inputs[1])
    axes = axes_of(table, node, len(shape), index=3) if shape is not None else None
    if shape is None or pads is None or axes is None or len(pads) != 2 * len(axes):
        return None
    given = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
    return [given.get(axis, (0, 0)) for axis in range(len(shape))]
