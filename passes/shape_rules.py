"""Inference of symbolic shapes over a graph: one rule per operator, for what shape inference leaves open."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from cpcompile.passes.axes import ONE, Axis, Shape, broadcast, divide
from cpcompile.passes.nodes import int_attribute, permutation, post_order, subgraphs_of
from cpcompile.passes.operators import ELEMENTWISE, NOT_ZERO_AT_ZERO, REDUCTIONS, ZERO_AT_ZERO, is_standard
from cpcompile.passes.symbolic_shapes import ShapeTable, axes_left, padding_of


def infer_symbolic_shapes(graph: ir.Graph) -> ShapeTable:
    """The table of all values of `graph` and its subgraphs."""
    table = ShapeTable()
    for node in post_order(graph):
        if not is_standard(node):
            continue
        if value_rule := _VALUES.get(node.op_type):
            value = value_rule(table, node)
            if value is not None and _fits(value, node.outputs[0].dtype):
                table.symbolic_values[node.outputs[0]] = value
        if shape_rule := _SHAPES.get(node.op_type):
            shape = shape_rule(table, node)
            if shape is not None:
                table.shapes[node.outputs[0]] = shape
        if shapes_rule := _OTHER_SHAPES.get(node.op_type):
            table.shapes.update(shapes_rule(table, node))
    return table


# Symbolic values: vectors of lengths.


def _fits(value: Shape, dtype: ir.DataType | None) -> bool:
    """Whether no element overflows; lengths are computed in these two types."""
    bits = {None: 63, ir.DataType.INT64: 63, ir.DataType.INT32: 31}.get(dtype, 0)
    return bits > 0 and all(-(2**bits) <= axis.n < 2**bits for axis in value)


def _shape_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    shape = table.shape(node.inputs[0])
    if shape is None:
        return None
    start, end = int_attribute(node, "start", 0), int_attribute(node, "end", len(shape))
    return shape[start:end]


def _slice_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    elements = table.symbolic_value(node.inputs[0])
    starts, ends = table.integers(node.inputs[1]), table.integers(node.inputs[2])
    steps = table.integers(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if elements is None or not starts or not ends or not steps:
        return None
    return elements[slice(starts[0], min(ends[0], len(elements)), steps[0])]


def _gather_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    elements, indices = table.symbolic_value(node.inputs[0]), table.integers(node.inputs[1])
    return None if elements is None or indices is None else tuple(elements[i] for i in indices)


def _concat_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    parts = [table.symbolic_value(value) for value in node.inputs]
    return None if any(part is None for part in parts) else tuple(axis for part in parts if part for axis in part)


def _same_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    elements, out = table.symbolic_value(node.inputs[0]), node.outputs[0]
    if elements is None or (out.dtype is not None and out.dtype not in (ir.DataType.INT32, ir.DataType.INT64)):
        return None
    vector = out.shape is not None and out.shape.rank() <= 1
    return elements if vector or len(elements) == 1 else None


def _product_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    first, second = (table.symbolic_value(value) for value in node.inputs)
    if first is None or second is None or len(first) != len(second):
        return None
    return tuple(a * b for a, b in zip(first, second, strict=True))


def _quotient_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    first, second = (table.symbolic_value(value) for value in node.inputs)
    if first is None or second is None or len(first) != len(second):
        return None
    quotients = [divide([a], [b]) for a, b in zip(first, second, strict=True)]
    return None if any(q is None for q in quotients) else tuple(q for q in quotients if q is not None)


# Shapes of results that shape inference leaves open.


def _reshape(table: ShapeTable, node: ir.Node) -> Shape | None:
    shape, wanted = table.shape(node.inputs[0]), table.symbolic_value(node.inputs[1])
    if shape is None or wanted is None:
        return None
    copies = not int_attribute(node, "allowzero", 0)
    axes = [shape[i] if copies and axis == Axis((), 0) and i < len(shape) else axis for i, axis in enumerate(wanted)]
    open_axis = Axis((), -1)
    if open_axis in axes:
        at = axes.index(open_axis)
        rest = divide(shape, axes[:at] + axes[at + 1 :])
        if rest is None:
            return None
        axes[at] = rest
    return tuple(axes)


def _transpose(table: ShapeTable, node: ir.Node) -> Shape | None:
    shape = table.shape(node.inputs[0])
    return None if shape is None else tuple(shape[axis] for axis in permutation(node, len(shape)))


def _broadcast(table: ShapeTable, node: ir.Node) -> Shape | None:
    return broadcast([table.shape(value) for value in node.inputs])


def _expand(table: ShapeTable, node: ir.Node) -> Shape | None:
    return broadcast([table.shape(node.inputs[0]), table.symbolic_value(node.inputs[1])])


def _matmul(table: ShapeTable, node: ir.Node) -> Shape | None:
    first, second = table.shape(node.inputs[0]), table.shape(node.inputs[1])
    if first is None or second is None or len(first) < 2 or len(second) < 2:
        return None
    batch = broadcast([first[:-2], second[:-2]])
    return None if batch is None else (*batch, first[-2], second[-1])


def _same(table: ShapeTable, node: ir.Node) -> Shape | None:
    return table.shape(node.inputs[0])


def _pad(table: ShapeTable, node: ir.Node) -> Shape | None:
    shape, padding = table.shape(node.inputs[0]), padding_of(table, node)
    if shape is None or padding is None:
        return None
    axes = []
    for at, (axis, (before, after)) in enumerate(zip(shape, padding, strict=True)):
        longer = Axis((), axis.n + before + after) if axis.is_static else Axis((f"?{node.outputs[0].name}.{at}",), 1)
        axes.append(longer if before or after else axis)
    return tuple(axes)


def _reduce(table: ShapeTable, node: ir.Node) -> Shape | None:
    shape, left = table.shape(node.inputs[0]), axes_left(table, node)
    if shape is None or left is None:
        return None
    if int_attribute(node, "keepdims", 1):
        return tuple(axis if at in left else ONE for at, axis in enumerate(shape))
    return tuple(shape[at] for at in left)


def _looped(table: ShapeTable, node: ir.Node) -> dict[ir.Value, Shape]:
    """What a Loop makes: an axis of a state that is the same before, in and after an iteration is it at the end."""
    (body,) = subgraphs_of(node)
    shapes: dict[ir.Value, Shape] = {}
    states = len(node.inputs) - 2
    for element, out in zip(body.outputs[1 + states :], node.outputs[states:], strict=True):
        if (own := table.shape(element)) is not None:
            shapes[out] = (Axis((f"?{out.name}.0",), 1), *own)
    for values in zip(node.inputs[2:], body.inputs[2:], body.outputs[1:], node.outputs, strict=False):
        known = [shape for shape in map(table.shape, values[:3]) if shape is not None]
        if len(known) == 3 and len({len(shape) for shape in known}) == 1:
            unknown = (Axis((f"?{values[3].name}.{at}",), 1) for at in range(len(known[0])))
            axes = zip(*known, unknown, strict=True)
            shapes[values[3]] = tuple(a if a == b == c else other for a, b, c, other in axes)
    return shapes


def _caches(table: ShapeTable, node: ir.Node) -> dict[ir.Value, Shape]:
    """What an Attention makes of its caches: longer ones."""
    shapes: dict[ir.Value, Shape] = {}
    for past, present in zip(node.inputs[4:6], node.outputs[1:3], strict=False):
        if (shape := table.shape(past)) is not None and len(shape) == 4:
            shapes[present] = (*shape[:2], Axis((f"?{present.name}.2",), 1), shape[3])
    return shapes


def _unsqueeze(table: ShapeTable, node: ir.Node) -> Shape | None:
    shape = table.shape(node.inputs[0])
    attribute = node.attributes.get("axes")
    axes = attribute.as_ints() if attribute is not None else table.integers(node.inputs[1])
    if shape is None or axes is None:
        return None
    rank = len(shape) + len(axes)
    new = {axis % rank for axis in axes}
    rest = iter(shape)
    return tuple(ONE if axis in new else next(rest) for axis in range(rank))


_Rule = Callable[[ShapeTable, ir.Node], Shape | None]

_VALUES: dict[str, _Rule] = {
    "Shape": _shape_value,
    "Slice": _slice_value,
    "Gather": _gather_value,
    "Concat": _concat_value,
    "Squeeze": _same_value,
    "Unsqueeze": _same_value,
    "Reshape": _same_value,
    "Cast": _same_value,
    "CastLike": _same_value,
    "Identity": _same_value,
    "Mul": _product_value,
    "Div": _quotient_value,
}

_SHAPES: dict[str, _Rule] = {
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Expand": _expand,
    "MatMul": _matmul,
    "Unsqueeze": _unsqueeze,
    "Pad": _pad,
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(ELEMENTWISE, _broadcast),
    **dict.fromkeys(ZERO_AT_ZERO + NOT_ZERO_AT_ZERO, _same),
    **dict.fromkeys(("CastLike", "Clip", "Trilu", "RotaryEmbedding", "BatchNormalization"), _same),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization", "QuantizeLinear", "DequantizeLinear"), _same),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "RMSNormalization"), _same),
}

_OTHER_SHAPES: dict[str, Callable[[ShapeTable, ir.Node], dict[ir.Value, Shape]]] = {
    "Loop": _looped,
    "Attention": _caches,
}
"""Operator -> the shapes of results other than the first, and of Loop all of them."""
