"""Random inputs for any model: normal numbers, and whole numbers in the ranges that the graph gives them.

A language model with a cache gets random tokens after a random past; its mask and its positions follow from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from cpcompile.core.cache import IN_PLACE, INPUT, KEEP, MASK, PAST, POSITIONS, complete
from cpcompile.core.types import Array, Feeds
from cpcompile.validation.input_uses import InputRange, InputUses, find_input_uses

LENGTHS = ((2, 3, 5, 7), (1, 4, 6, 8), (8, 16, 32, 64))
"""Lengths that the symbolic axes get, in the order in which they appear; one run for each row."""
MORE_LENGTHS = ((1, 32), (1, 64), (1, 512), (1, 3, 64, 64))
"""For models that refuse all of these: images and sounds have a least length, or one that has to be divisible."""
SHARE = 2
"""At most one element in so many is an end of the range or a number that the graph compares the input with."""


class RandomInputs:
    """Iterates over random inputs of one model; nothing if one of its types cannot be drawn."""

    def __init__(self, session: ort.InferenceSession, model: ir.Model, *, rounds: int = 1) -> None:
        """`model` is the graph of `session`; in every round all `LENGTHS` are tried."""
        self._inputs = [(value.name, dtype_of(value), value.shape) for value in session.get_inputs()]
        names = {name for name, *_ in self._inputs}
        cached = INPUT in names and any(PAST.fullmatch(name) for name in names)
        self._dependent = names & {MASK, POSITIONS, KEEP} if cached else set()
        # GroupQueryAttention takes several tokens after a cache from one text alone.
        texts = [shape[0] for name, _, shape in self._inputs if name == INPUT and IN_PLACE in model.metadata_props]
        self._fixed = dict.fromkeys(texts, 1)
        self._rounds = rounds
        self._uses = find_input_uses(model)
        self.ranges: dict[str, InputRange] = {}
        """Of inputs that get whole numbers: what was drawn up to now."""

    def __iter__(self) -> Iterator[Feeds]:
        return self.of(LENGTHS * self._rounds)

    def of(self, rows: Sequence[Sequence[int]]) -> Iterator[Feeds]:
        """One set of inputs for each row of lengths."""
        symbols = list(dict.fromkeys(dim for *_, shape in self._inputs for dim in shape if not isinstance(dim, int)))
        rng, begun = np.random.default_rng(0), Counter[str]()
        for turn, row in enumerate(rows):
            if turn % len(LENGTHS) and not (symbols or self.ranges):
                continue  # nothing but normal numbers would differ
            lengths = {symbol: row[i % len(row)] for i, symbol in enumerate(symbols)} | self._fixed
            feeds: dict[str, Array] = {}
            for name, dtype, shape in self._inputs:
                if dtype is None:
                    return
                if name in self._dependent:
                    continue
                uses = self._uses.get(name) or InputUses(name)
                sizes = [dim if isinstance(dim, int) else lengths[dim] for dim in shape]
                drawn = uses.range(dtype, lengths)
                if drawn is None:
                    feeds[name] = rng.standard_normal(sizes).astype(dtype)
                    continue
                array, placed = _draw(rng, sizes, drawn, uses.landmarks, begun[name])
                feeds[name] = array.astype(dtype)
                begun[name] += placed
                self.ranges[name] = drawn.joined(self.ranges.get(name, drawn))
            yield complete(feeds, dict.fromkeys(self._dependent, ())) if self._dependent else feeds


def _draw(
    rng: np.random.Generator, shape: Sequence[int], drawn: InputRange, landmarks: Sequence[int], first: int
) -> tuple[Array, int]:
    """Whole numbers of the range. Some are landmarks and ends, in turn from the `first` one on; also how many."""
    array = np.asarray(rng.integers(drawn.low, drawn.high, shape, endpoint=True))
    near = (each + step for step in (0, 1, -1) for each in landmarks)
    points = [each for each in dict.fromkeys((*near, drawn.high, drawn.low)) if drawn.low <= each <= drawn.high]
    count = min(len(points), -(-array.size // SHARE))
    array.reshape(-1)[rng.permutation(array.size)[:count]] = np.roll(points, -first)[:count]
    return array, count


def dtype_of(value: Any) -> np.dtype[Any] | None:
    """The type of a session's tensor input; None for strings, sequences and optionals."""
    name = value.type.removeprefix("tensor(").removesuffix(")").replace("double", "float64").upper()
    name = {"FLOAT32": "FLOAT", "FLOAT64": "DOUBLE"}.get(name, name)
    known = ir.DataType.__members__.get(name)
    return None if known is None or known == ir.DataType.STRING else known.numpy()
