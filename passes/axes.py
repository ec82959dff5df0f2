"""Lengths of axes as exact products of known and unknown factors.

An axis is `outer x n`: unknown factors such as batch, and a known inner factor n; channel i of the
axis is index i modulo n. (batch, heads, sequence, 32) reshaped to (-1, sequence, 32) thus has
the axis batch x heads, and its heads can still be told apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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


def divide(total: Sequence[Axis], parts: Sequence[Axis]) -> Axis | None:
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


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """Axes of an elementwise result; None if axes may differ."""
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
