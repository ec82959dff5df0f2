from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcompile.core.reshape import match_axes

Groups = list[tuple[list[int], list[int]]]


def groups_of(first: tuple[int, ...], second: tuple[int, ...]) -> Groups | None:
    groups = match_axes(first, second, prod)
    return None if groups is None else [(list(group.first), list(group.second)) for group in groups]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((2, 3), (2, 3), [([0], [0]), ([1], [1])]),
        ((2, 12), (2, 3, 4), [([0], [0]), ([1], [1, 2])]),
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((4, 6), (6, 4), [([0, 1], [0, 1])]),
        ((4,), (4, 1), [([0], [0]), ([], [1])]),
        ((1, 4), (4,), [([0, 1], [0])]),
        ((4, 1, 6), (4, 6), [([0], [0]), ([1, 2], [1])]),
        ((), (1, 1), [([], [0]), ([], [1])]),
        ((), (), []),
    ],
)
def test_the_smallest_groups(first: tuple[int, ...], second: tuple[int, ...], expected: Groups) -> None:
    assert groups_of(first, second) == expected


@pytest.mark.parametrize(("first", "second"), [((2, 3), (2, 4)), ((6,), (2, 2)), ((2,), ())])
def test_shapes_of_other_sizes_do_not_match(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    assert groups_of(first, second) is None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.data())
def test_elements_stay_in_their_group(first: list[int], data: st.DataObject) -> None:
    """An element's position along the axes of one group depends on nothing but its position along the other side."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(first) - 1)) if len(first) > 1 else st.just(set())))
    second = [prod(first[a:b]) for a, b in zip([0, *cuts], [*cuts, len(first)], strict=True)]
    groups = match_axes(first, second, prod)
    assert groups is not None
    assert [axis for group in groups for axis in group.first] == list(range(len(first)))
    assert [axis for group in groups for axis in group.second] == list(range(len(second)))
    old, new = np.indices(first), np.indices(second).reshape(len(second), *first)
    for ours, theirs in groups:
        assert prod(first[axis] for axis in ours) == prod(second[axis] for axis in theirs)
        a, b = (
            sum(grid[axis] * prod(shape[k] for k in axes if k > axis) for axis in axes) if len(axes) else 0
            for grid, shape, axes in ((old, first, ours), (new, second, theirs))
        )
        assert np.array_equal(np.broadcast_to(a, first), np.broadcast_to(b, first))
