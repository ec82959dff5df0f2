"""Shapes with dynamic axes, as exact products.

An axis is `outer x n`: unknown factors such as batch, and a known inner factor n; channel i of the
axis is index i modulo n. (batch, heads, sequence, 32) reshaped to (-1, sequence, 32) thus has
the axis batch x heads, and its heads can still be told apart.

Small integer vectors (results of Shape, Slice, Concat, … that feed Reshape and Expand) are followed as vectors
of such axes. `ShapeTable` holds both for every value of a graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir


@dataclass(frozen=True)
class Axis:
    """The length `product(outer) * n`."""

    outer: tuple[str, ...]
    n: int

    @property
    def is_static(self) -> bool:
        return not self.outer

    @property
    def dimension(self) -> int | ir.SymbolicDim:
        """As a dimension of a value: a number, a name, or unknown."""
        named = self.n == 1 and len(self.outer) == 1 and not self.outer[0].startswith("?")
        return self.n if self.is_static else ir.SymbolicDim(self.outer[0] if named else None)

    def __mul__(self, other: Axis) -> Axis:
        """This axis merged with the one to its right."""
        if not other.outer:
            return Axis(self.outer, self.n * other.n)
        left = (*self.outer, str(self.n)) if self.n != 1 else self.outer
        return Axis((*left, *other.outer), other.n)

    def same_length(self, other: Axis) -> bool:
        """Whether both have the same length, whatever the unknown factors are."""
        return same_product([self], [other])


ONE = Axis((), 1)
Shape = tuple[Axis, ...]


RANDOM = (
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"),
)
"""Operators that give, or may give, another result every time."""


def is_standard(node: ir.Node) -> bool:
    """Whether the operator is one of the ONNX standard."""
    return node.domain in ("", "ai.onnx")


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a constant; None for an initializer that is also an input, because a caller may replace it."""
    return None if value.is_graph_input() else value.const_value


def same_product(first: Sequence[Axis], second: Sequence[Axis]) -> bool:
    """Whether two runs of axes hold the same number of elements."""
    return first == second or _factors(first) == _factors(second)


def _factors(axes: Sequence[Axis]) -> tuple[Counter[str], int]:
    symbols = Counter(s for axis in axes for s in axis.outer if not s.isdigit())
    number = prod(axis.n for axis in axes) * prod(int(s) for axis in axes for s in axis.outer if s.isdigit())
    return symbols, number


def size_of(axes: Sequence[Axis]) -> tuple[int, int, tuple[str, ...]]:
    """The number of elements along `axes`, comparable by the number of unknown factors, then by the known factor."""
    symbols, number = _factors(axes)
    return symbols.total(), number, tuple(sorted(symbols.elements()))


def _divide(total: Sequence[Axis], parts: Sequence[Axis]) -> Axis | None:
    """The axis that makes `parts` as large as `total`; None if that is no whole axis."""
    symbols, number = _factors(total)
    part_symbols, part_number = _factors(parts)
    rest = symbols - part_symbols
    if part_symbols - symbols or not part_number or number % part_number:
        return None
    # Unknown factors in the order in which they appear, the known factor innermost.
    order = [s for axis in total for s in axis.outer if not s.isdigit()]
    outer = []
    for symbol in order:
        if rest[symbol]:
            rest[symbol] -= 1
            outer.append(symbol)
    return Axis(tuple(outer), number // part_number)


def subgraphs_of(node: ir.Node) -> list[ir.Graph]:
    """The sub-graphs of `node`."""
    subgraphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            subgraphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            subgraphs += attribute.as_graphs()
    return subgraphs


def post_order(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes in post-order: those of subgraphs before the node that has the subgraphs."""
    for node in graph:
        for subgraph in subgraphs_of(node):
            yield from post_order(subgraph)
        yield node


class ShapeTable:
    """Symbolic shapes of all values of a graph and its subgraphs, and symbolic values of its small integer vectors."""

    def __init__(self, graph: ir.Graph) -> None:
        self._shapes: dict[ir.Value, Shape | None] = {}
        self._symbolic_values: dict[ir.Value, Shape] = {}
        for node in post_order(graph):
            if not is_standard(node):
                continue
            if held := _VALUES.get(node.op_type):
                result = held(self, node)
                if result is not None:
                    self._symbolic_values[node.outputs[0]] = result
            if shape := _SHAPE.get(node.op_type):
                derived = shape(self, node)
                if derived is not None:
                    self._shapes[node.outputs[0]] = derived
            if shapes := _SHAPES.get(node.op_type):
                self._shapes.update(shapes(self, node))

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The axes of `value`; None if not even their number is known."""
        if value is None:
            return None
        if value not in self._shapes:
            tensor = constant_of(value)
            shape = value.shape if tensor is None else tensor.shape
            self._shapes[value] = None if shape is None else tuple(_axis(value, i, d) for i, d in enumerate(shape))
        return self._shapes[value]

    def narrow(self, value: ir.Value, shape: Shape) -> None:
        """From now on `value` has this shape, which it stretches where it is read."""
        self._shapes[value] = shape
        value.shape = ir.Shape(axis.dimension for axis in shape)

    def symbolic_value(self, value: ir.Value | None) -> Shape | None:
        """The elements of an integer vector or scalar, each as a product; None if they are not known."""
        if value is None:
            return None
        if value not in self._symbolic_values:
            tensor = constant_of(value)
            if tensor is None or tensor.size > 64 or not tensor.dtype.is_integer() or len(tensor.shape) > 1:
                return None
            self._symbolic_values[value] = tuple(Axis((), int(number)) for number in tensor.numpy().reshape(-1))
        return self._symbolic_values[value]

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """The elements of a constant integer vector or scalar; None if they are not known."""
        held = self.symbolic_value(value)
        return [axis.n for axis in held] if held is not None and all(a.is_static for a in held) else None


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


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


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


# Symbolic values: vectors of lengths.


def _shape_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    shape = table.shape(node.inputs[0])
    if shape is None:
        return None
    start, end = int_attribute(node, "start", 0), int_attribute(node, "end", len(shape))
    return shape[start:end]


def _slice_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    held = table.symbolic_value(node.inputs[0])
    starts, ends = table.integers(node.inputs[1]), table.integers(node.inputs[2])
    steps = table.integers(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if held is None or not starts or not ends or not steps:
        return None
    return held[slice(starts[0], min(ends[0], len(held)), steps[0])]


def _gather_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    held, indices = table.symbolic_value(node.inputs[0]), table.integers(node.inputs[1])
    return None if held is None or indices is None else tuple(held[i] for i in indices)


def _concat_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    parts = [table.symbolic_value(value) for value in node.inputs]
    return None if any(part is None for part in parts) else tuple(axis for part in parts if part for axis in part)


def _same_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    held, out = table.symbolic_value(node.inputs[0]), node.outputs[0]
    if held is None or (out.dtype is not None and out.dtype not in (ir.DataType.INT32, ir.DataType.INT64)):
        return None
    vector = out.shape is not None and out.shape.rank() <= 1
    return held if vector or len(held) == 1 else None


def _product_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    first, second = (table.symbolic_value(value) for value in node.inputs)
    if first is None or second is None or len(first) != len(second):
        return None
    return tuple(a * b for a, b in zip(first, second, strict=True))


def _quotient_value(table: ShapeTable, node: ir.Node) -> Shape | None:
    first, second = (table.symbolic_value(value) for value in node.inputs)
    if first is None or second is None or len(first) != len(second):
        return None
    quotients = [_divide([a], [b]) for a, b in zip(first, second, strict=True)]
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
        rest = _divide(shape, axes[:at] + axes[at + 1 :])
        if rest is None:
            return None
        axes[at] = rest
    return tuple(axes)


def _transpose(table: ShapeTable, node: ir.Node) -> Shape | None:
    shape = table.shape(node.inputs[0])
    return None if shape is None else tuple(shape[axis] for axis in permutation(node, len(shape)))


def permutation(node: ir.Node, rank: int) -> list[int]:
    """The axes of a Transpose."""
    attribute = node.attributes.get("perm")
    return list(attribute.as_ints()) if attribute is not None else list(range(rank))[::-1]


def _broadcast(table: ShapeTable, node: ir.Node) -> Shape | None:
    return broadcast([table.shape(value) for value in node.inputs])


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """Axes of an elementwise result; None where axes cannot be told to fit."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes):
        return None
    rank = max(len(shape) for shape in known)
    result = []
    for axis in range(rank):
        candidates = [shape[axis - rank] for shape in known if len(shape) >= rank - axis]
        wide = [candidate for candidate in candidates if candidate != ONE]
        if any(not candidate.same_length(wide[0]) for candidate in wide):
            return None
        result.append(wide[0] if wide else ONE)
    return tuple(result)


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


ZERO_AT_ZERO = (
    *("Abs", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Elu", "Erf", "Floor", "Gelu", "HardSwish", "Identity"),
    *("LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu", "Sign", "Sin", "Sinh", "Softsign", "Sqrt", "Swish", "Tan"),
    *("Tanh", "ThresholdedRelu"),
)
"""Elementwise operators of one operand that make 0 of 0."""
NOT_ZERO_AT_ZERO = (
    *("Cos", "Cosh", "Exp", "HardSigmoid", "IsInf", "IsNaN", "Log", "Not", "Reciprocal", "Sigmoid", "Softplus"),
)
"""Elementwise operators of one operand that make something else of 0."""
ELEMENTWISE = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod"),
    *("Mul", "Or", "Pow", "PRelu", "Sub", "Sum", "Where", "Xor"),
)
"""Elementwise operators of several operands, which stretch to a common shape."""

REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
    *("ReduceSum", "ReduceSumSquare"),
)

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

_SHAPE: dict[str, _Rule] = {
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

_SHAPES: dict[str, Callable[[ShapeTable, ir.Node], dict[ir.Value, Shape]]] = {"Loop": _looped, "Attention": _caches}
"""Of results other than the first."""
