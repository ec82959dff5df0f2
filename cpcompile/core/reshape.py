"""Which axes of two shapes a reshape maps to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from _typeshed import SupportsRichComparison

Axis = TypeVar("Axis")


class AxisGroup(NamedTuple):
    """Neighbouring axes of two shapes that hold the same elements, as ranges of axis numbers."""

    first: range
    second: range


def match_axes(
    first: Sequence[Axis], second: Sequence[Axis], size: Callable[[Sequence[Axis]], SupportsRichComparison]
) -> list[AxisGroup] | None:
    """The smallest groups of neighbouring axes that a reshape from `first` to `second` maps to each other.

    size: gives the number of elements of some axes, or a value that compares in the same way.
    Returns None if the shapes do not hold the same number of elements, as far as `size` can tell.
    """
    groups, i, j = [], 0, 0
    while i < len(first) or j < len(second):
        start_i, start_j = i, j
        i, j = min(i + 1, len(first)), min(j + 1, len(second))
        while (ours := size(first[start_i:i])) != (theirs := size(second[start_j:j])):
            # The side with fewer elements takes the next axis.
            if j < len(second) and (i == len(first) or theirs < ours):  # type: ignore[operator]
                j += 1
            elif i < len(first):
                i += 1
            else:
                return None
        groups.append(AxisGroup(range(start_i, i), range(start_j, j)))
    return groups
