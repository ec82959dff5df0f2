"""Which numbers an input takes, read from what the graph does with it.

    ids -> Cast -> Add(2) -> Gather(100 rows)        0 <= ids + 2 <= 99, so -2 to 97
    sample_rate -> Equal(16000) -> If                15999 to 16001, and 16000 in any case
    mask -> Cast(float) -> Sub(1, mask)              0 and 1

Values computed from the input are followed as `scale * input + shift`, also into subgraphs. What arithmetic with other
values makes of them is a number like any other, as long as it does not end up as an index or a size. Everything else is
unknown: operators of other domains, target shapes, comparisons with computed values.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from cpcompile.passes.infer_shapes import InferShapes
from cpcompile.passes.nodes import constant_of, int_attribute, subgraphs_of
from cpcompile.passes.operators import is_standard

Step = tuple[ir.Value, "_Form | None"]

INDICES: Mapping[tuple[str, str, int], tuple[int, str, int]] = {
    ("", "Gather", 1): (0, "axis", 0),
    ("", "GatherElements", 1): (0, "axis", 0),
    ("", "Scatter", 1): (0, "axis", 0),
    ("", "ScatterElements", 1): (0, "axis", 0),
    ("", "RotaryEmbedding", 3): (1, "", 0),
    ("", "ReverseSequence", 1): (0, "time_axis", 0),
    **{("", recurrent, 4): (0, "", 0) for recurrent in ("GRU", "LSTM", "RNN")},
    ("ai.onnx.ml", "ArrayFeatureExtractor", 1): (0, "", -1),
    ("com.microsoft", "RotaryEmbedding", 1): (2, "", 0),
    ("com.microsoft", "EmbedLayerNormalization", 0): (2, "", 0),
    ("com.microsoft", "EmbedLayerNormalization", 1): (4, "", 0),
    ("com.microsoft", "GatherBlockQuantized", 1): (0, "gather_axis", 0),
}
"""Domain, operator and position of indices -> position of what they index, the attribute with the axis, its default."""

SMALL_SIZES = {
    *(("ConstantOfShape", 0), ("Loop", 0), ("NonMaxSuppression", 2), ("OneHot", 1), ("Range", 0), ("Range", 1)),
    *(("Range", 2), ("Slice", 1), ("Slice", 2), ("Tile", 1), ("TopK", 1), ("Trilu", 1)),
}
"""Operator and position of sizes for which a small positive number will do."""
OTHER_SIZES = {
    *(("AffineGrid", 1), ("Attention", 6), ("CenterCropPad", 1), ("Col2Im", 1), ("Col2Im", 2), ("CumSum", 1)),
    *(("DFT", 1), ("DFT", 2), ("Expand", 1), ("MaxUnpool", 2), ("Pad", 1), ("Pad", 3), ("Reshape", 1), ("Resize", 3)),
    *(("STFT", 1), ("STFT", 3), ("SequenceAt", 1), ("Slice", 3), ("Slice", 4), ("Split", 1), ("SplitToSequence", 1)),
    *(("Squeeze", 1), ("TensorScatter", 2), ("Unsqueeze", 1)),
    *((f"Reduce{kind}", 1) for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum")),
    ("ReduceSumSquare", 1),
}
"""Operator and position of sizes, axes and positions that have to fit something else."""

MOVES: Mapping[str, tuple[int, ...] | None] = {
    **dict.fromkeys(("Compress", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Pad", "Reshape"), (0,)),
    **dict.fromkeys(("Dropout", "Slice", "Split", "Squeeze", "Tile", "Trilu", "Unsqueeze", "Transpose"), (0,)),
    **dict.fromkeys(("CastLike", "Ceil", "Floor", "Identity", "Round", "DepthToSpace", "SpaceToDepth"), (0,)),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), (0,)),
    **dict.fromkeys(("Scatter", "ScatterElements", "ScatterND"), (0, 2)),
    "Concat": None,
    "Where": (1, 2),
}
"""Operators whose results are elements of these inputs (None: of all), unchanged."""

COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
STOPS = (
    *("And", "ArgMax", "ArgMin", "EyeLike", "IsInf", "IsNaN", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Or"),
    *("RandomNormalLike", "RandomUniformLike", "Shape", "Size", "Xor"),
)
"""Operators whose results are in a range of their own, whatever the input holds."""

FORMS = 4
"""Different forms in which one value is followed; more than that and it is a number like any other."""
LARGE = 1 << 16
"""Constants with more elements are not read."""
NUMBERS, SIZE, BINARY = (-128, 127), (1, 4), (0, 1)


@dataclass(frozen=True)
class InputRange:
    """The whole numbers that are drawn for an input."""

    name: str
    low: int
    high: int
    source: str
    """What in the graph says so; if it is not known, why not."""
    known: bool

    def joined(self, other: InputRange) -> InputRange:
        """The range of both, with the words of this one."""
        return dataclasses.replace(self, low=min(self.low, other.low), high=max(self.high, other.high))

    def __str__(self) -> str:
        return f"{self.name}: {self.low:,} to {self.high:,} ({self.source})"


@dataclass(frozen=True)
class _Form:
    """`scale * input + shift`, where the shift is anywhere from `low` to `high`."""

    scale: Fraction = Fraction(1)
    low: Fraction = Fraction(0)
    high: Fraction = Fraction(0)

    def shifted(self, low: Fraction, high: Fraction) -> _Form:
        return _Form(self.scale, self.low + low, self.high + high)

    def times(self, factor: Fraction) -> _Form:
        low, high = sorted((self.low * factor, self.high * factor))
        return _Form(self.scale * factor, low, high)

    def inputs(self, low: int | Fraction, high: int | Fraction) -> tuple[int, int]:
        """The first and the last input for which the form is never outside of `low` to `high`."""
        ends = (low - self.low) / self.scale, (high - self.high) / self.scale
        first, last = ends if self.scale > 0 else reversed(ends)
        return math.ceil(first), math.floor(last)


@dataclass
class InputUses:
    """What a graph does with one input."""

    name: str
    limits: list[tuple[_Form, int, int | str, str]] = field(default_factory=list)
    """Form, lowest value, number of values (or the name of an axis), and what is indexed."""
    landmarks: list[int] = field(default_factory=list)
    """What the input is compared with or clipped to."""
    binary: str = ""
    """What makes it a mask."""
    size: str = ""
    number: str = ""
    unknown: str = ""

    def range(self, dtype: np.dtype[Any], lengths: Mapping[str, int]) -> InputRange | None:
        """The whole numbers that the input takes if the axes are that long; None for a float that takes any number."""
        low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "iu" else (-(1 << 24), 1 << 24)
        limits = []
        for form, lowest, count, what in self.limits:
            length = count if isinstance(count, int) else lengths.get(count)
            if length is not None and length > 0:
                limits.append((*form.inputs(lowest, lowest + length - 1), what))
        if limits:
            least, most = max(low, *(each[0] for each in limits)), min(high, *(each[1] for each in limits))
            if least <= most:
                return InputRange(self.name, least, most, min(limits, key=lambda each: each[1])[2], True)
            return InputRange(self.name, *BINARY, "its uses as an index contradict each other", False)
        if dtype.kind not in "iub":
            return None
        if dtype.kind == "b":
            return InputRange(self.name, *BINARY, "bool", True)
        if self.binary:
            return InputRange(self.name, *BINARY, self.binary, True)
        if dtype.itemsize == 1:
            return InputRange(self.name, low, high, str(dtype), True)
        unknown = self.unknown or ("an index of an axis of unknown length" if self.limits else "")
        near = [each + step for each in self.landmarks for step in (-1, 1)]
        near += NUMBERS if self.number and not unknown else ()
        near = [min(max(each, low), high) for each in near]
        if near and not unknown:
            return InputRange(self.name, min(near), max(near), self.number or "compared with constants", True)
        if self.size and not (unknown or near):
            return InputRange(self.name, *SIZE, self.size, True)
        if not (unknown or self.size):
            return InputRange(self.name, *BINARY, "nothing reads it", True)
        return InputRange(
            self.name, min(near, default=BINARY[0]), max(near, default=BINARY[1]), unknown or self.size, False
        )


def find_input_uses(model: ir.Model) -> dict[str, InputUses]:
    """What `model`, which stays as it is, does with each of its inputs."""
    model = model.clone()
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]  # defaults are not drawn
    model.graph.inputs.clear()
    model.graph.inputs.extend(inputs)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.shape = ir.Shape(value.const_value.shape.numpy())
    for each in (InlinePass(), LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0), InferShapes()):
        each(model)
    leaving = _leaving(model)
    return {value.name or "": _Walk(leaving, value).uses for value in model.graph.inputs}


def _leaving(model: ir.Model) -> dict[ir.Value, list[tuple[ir.Node, ir.Graph, int]]]:
    """Output of a subgraph -> the node that the subgraph belongs to, and the number of the output."""
    leaving: dict[ir.Value, list[tuple[ir.Node, ir.Graph, int]]] = {}
    for node in model.graph.all_nodes():
        for graph in subgraphs_of(node):
            for number, out in enumerate(graph.outputs):
                leaving.setdefault(out, []).append((node, graph, number))
    return leaving


class _Walk:
    """Follows one input to everything that is made of it."""

    def __init__(self, leaving: Mapping[ir.Value, list[tuple[ir.Node, ir.Graph, int]]], value: ir.Value) -> None:
        self.uses = InputUses(value.name or "")
        if "mask" in self.uses.name.lower():
            self.uses.binary = "named a mask"
        whole = value.dtype is not None and not value.dtype.is_floating_point()
        pending: list[Step] = [(value, _Form())]
        seen: set[Step] = set()
        forms: Counter[ir.Value] = Counter()
        while pending:
            current, form = pending.pop()
            forms[current] += 1
            step = current, form if forms[current] <= FORMS else None
            if step in seen or (step[1] is None and not whole):  # floats may be anything, unless they are indices
                continue
            seen.add(step)
            for node, index in current.uses():
                pending += self._step(node, index, step[1])
            for node, graph, number in leaving.get(current, ()):
                if node.op_type != "Loop":
                    pending.append((node.outputs[number], step[1]))
                elif number:  # the first output of the body is the condition
                    pending.append((node.outputs[number - 1], step[1]))
                    pending += [(value, step[1]) for value in graph.inputs[number + 1 : number + 2]]

    def _step(self, node: ir.Node, index: int, form: _Form | None) -> Iterator[Step]:
        """Note what `node` does with its input `index`; the values to follow next."""
        domain, operator = "" if is_standard(node) else node.domain, node.op_type
        indexed = self._indexed(node, domain, index)
        if indexed is not None:
            if form is None:
                self._unknown(f"an index of {operator} is computed from it")
            else:
                self.uses.limits.append((form, 0, *indexed))
        elif domain == "ai.onnx.ml":
            keys = [key for name in ("keys_int64s", "cats_int64s") if (key := node.attributes.get(name)) is not None]
            self.uses.landmarks += [key for each in keys for key in each.as_ints()]
            if not keys:
                yield from self._arithmetic(node, index, None)
        elif domain:
            self._unknown(f"{domain}.{operator} reads it")
        elif (operator, index) in SMALL_SIZES or (operator, index) in OTHER_SIZES:
            if form is None or (operator, index) in OTHER_SIZES:
                self._unknown(f"{operator} takes it as a size or an axis")
            else:
                self.uses.size = f"a size of {operator}"
        elif operator in ("Loop", "Scan"):
            body = subgraphs_of(node)[0]
            if operator == "Scan" or index > 1:
                yield body.inputs[index], form
        elif operator in COMPARISONS:
            other = self._constant(node.inputs[1 - index])
            if form is None:
                self.uses.number = "used as a number"
            elif other is None:
                self._unknown(f"{operator} compares it with computed values")
            else:
                self._landmarks(form, *other)
        elif operator == "Cast" and int_attribute(node, "to", 0) == ir.DataType.BOOL.value:
            if form == _Form():
                self.uses.binary = "cast to bool"
        elif operator not in STOPS:
            yield from self._arithmetic(node, index, form)

    def _arithmetic(self, node: ir.Node, index: int, form: _Form | None) -> Iterator[Step]:
        """What `node` computes from its input `index`."""
        operator = node.op_type
        others = [
            self._constant(value) for value in node.inputs if value is not None and value is not node.inputs[index]
        ]
        only = others[0] if len(others) == 1 else None
        after: _Form | None = None
        moved = MOVES.get(operator, ())
        if form is None:
            pass
        elif operator == "Cast" or moved is None or index in moved:
            after = form
        elif operator == "Neg":
            after = form.times(Fraction(-1))
        elif operator in ("Div", "Mod") and index == 1 and self._is_whole(node.inputs[1]):
            self.uses.limits.append((form, 1, NUMBERS[1], f"a divisor of {operator}"))
            return
        elif operator in ("Clip", "Mod") and index == 0 and others and all(others):
            for low, high in filter(None, others):
                self._landmarks(form, low if operator == "Clip" else Fraction(0), high)
            return
        elif only is None:
            pass
        elif operator == "Add":
            after = form.shifted(*only)
        elif operator == "Sub":
            negative = (-only[1], -only[0])
            after = form.shifted(*negative) if index == 0 else form.times(Fraction(-1)).shifted(*only)
            if index == 1 and form == _Form() and only[0] == only[1] == 1:
                self.uses.binary = "subtracted from 1"
        elif operator in ("Max", "Min"):
            self._landmarks(form, *only)
            after = form
        elif operator == "Mul" and only[0] == only[1] != 0:
            after = form.times(only[0])
        elif operator == "Div" and index == 0 and only[0] == only[1] > 0:
            after = form.times(1 / only[0])
        if after is None:
            self.uses.number = "used as a number"
        yield from ((out, after) for out in (node.outputs[:1] if operator in ("TopK", "Dropout") else node.outputs))

    def _indexed(self, node: ir.Node, domain: str, index: int) -> tuple[int | str, str] | None:
        """If the input `index` holds indices: how many there are to choose from, and of what."""
        operator = node.op_type
        if not domain and operator == "OneHot" and index == 0:
            depth = self._constant(node.inputs[1])
            return (int(depth[1]) if depth else "", "depth of OneHot")
        if not domain and operator in ("GatherND", "ScatterND") and index == 1:
            first = int_attribute(node, "batch_dims", 0)
            width = shape[-1] if (shape := _shape(node.inputs[1])) else 1
            dims = _shape(node.inputs[0])[first : first + width] if isinstance(width, int) else []
            lengths = [dim for dim in dims if isinstance(dim, int)]
            return (min(lengths) if lengths and len(lengths) == len(dims) else "", f"indices of {operator}")
        if (domain, operator, index) not in INDICES:
            return None
        position, attribute, default = INDICES[domain, operator, index]
        table = node.inputs[position]
        axis, dims = int_attribute(node, attribute, default) if attribute else default, _shape(table)
        count = dims[axis] if -len(dims) <= axis < len(dims) else ""
        name = "" if table is None or table.producer() is not None else f" of {table.name}"
        return count, f"rows{name}" if axis == 0 else f"positions on axis {axis}{name}"

    def _constant(self, value: ir.Value | None) -> tuple[Fraction, Fraction] | None:
        """The smallest and the largest element of a constant of numbers."""
        tensor = None if value is None else constant_of(value)
        if tensor is None or not 0 < tensor.size <= LARGE or tensor.dtype == ir.DataType.STRING:
            return None
        array = tensor.numpy()
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            return None
        return Fraction(array.min().item()), Fraction(array.max().item())

    def _landmarks(self, form: _Form, low: Fraction, high: Fraction) -> None:
        for number in (low, high):
            for end in form.inputs(number, number):
                if abs(end) < 1 << 31 and end not in self.uses.landmarks:
                    self.uses.landmarks.append(end)

    def _unknown(self, why: str) -> None:
        self.uses.unknown = self.uses.unknown or why

    @staticmethod
    def _is_whole(value: ir.Value | None) -> bool:
        return value is not None and value.dtype is not None and value.dtype.is_integer()


def _shape(value: ir.Value | None) -> list[int | str]:
    """Lengths or names of the axes; empty if they are not known."""
    if value is None:
        return []
    tensor = value.const_value
    if tensor is not None:
        return list(tensor.shape.numpy())
    return [] if value.shape is None else [dim if isinstance(dim, int) else dim.value or "" for dim in value.shape]
