import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpcompile.core.selection import Selection, UnitKind
from cpcompile.training.allocation import (
    allocate,
    allocate_one_for_all,
    allocate_random,
    can_swap,
    floor_units,
    kept_units,
    swap_units,
)

NAMES = tuple("abcdefgh")


def importance(contexts: int, layers: int, units: int, seed: int = 0) -> dict[UnitKind, np.ndarray]:
    return {UnitKind.FFN: np.random.default_rng(seed).lognormal(sigma=2.0, size=(contexts, layers, units))}


def chosen(table: np.ndarray, **settings_: float) -> np.ndarray:
    values = {"budget": 0.25, "core_fraction": 0.5, "floor": 0.5} | settings_
    names, kind = NAMES[: table.shape[0]], UnitKind.FFN
    cores = {kind: values["core_fraction"]}
    return allocate(names, {kind: table}, {kind: values["budget"]}, core_fractions=cores, floor=values["floor"]).kept[
        kind
    ]


@settings(max_examples=60, deadline=None)
@given(
    contexts=st.integers(2, 6),
    layers=st.integers(1, 5),
    units=st.integers(2, 40),
    budget=st.floats(0.05, 1.0),
    core=st.floats(0.0, 1.0),
    floor=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_every_context_keeps_exactly_its_budget_and_no_layer_dies(
    contexts: int, layers: int, units: int, budget: float, core: float, floor: float, seed: int
) -> None:
    table = importance(contexts, layers, units, seed)[UnitKind.FFN]
    kept = chosen(table, budget=budget, core_fraction=core, floor=floor)
    assert kept.sum(axis=(1, 2)).tolist() == [kept_units(table.shape, budget)] * contexts
    assert kept.sum(axis=2).min() >= 1


def test_floors_hold_in_every_layer() -> None:
    table = importance(3, 4, 32)[UnitKind.FFN]
    table[:, 0] *= 1e6  # one layer would take everything
    kept = chosen(table, floor=0.5)
    assert kept.sum(axis=2).min() >= floor_units(table.shape, 0.25, 0.5) == 4


def test_core_holds_the_units_that_matter_to_all() -> None:
    table = np.ones((3, 1, 16))
    table[:, 0, 5] = 100.0  # to all
    table[0, 0, 6] = 100.0  # to one
    kept = chosen(table, budget=2 / 16, core_fraction=0.5, floor=0.0)
    assert kept[:, 0, 5].all()
    assert kept[:, 0, 6].tolist() == [True, False, False]


def test_own_units_are_disjoint_while_there_are_free_ones() -> None:
    kept = chosen(importance(3, 4, 32)[UnitKind.FFN])
    core = kept.all(axis=0)
    assert core.sum() == 16
    assert (kept & ~core).sum(axis=0).max() == 1


def test_own_units_are_shared_evenly_once_none_is_free() -> None:
    kept = chosen(importance(6, 1, 8)[UnitKind.FFN], budget=0.5)
    assert kept.sum(axis=(1, 2)).tolist() == [4] * 6
    holders = kept.sum(axis=0)[~kept.all(axis=0)]
    assert holders.max() - holders.min() <= 2  # a draft is greedy at its end


def test_one_for_all_gives_all_contexts_the_same() -> None:
    table = importance(3, 2, 16)
    kept = allocate_one_for_all(NAMES[:3], table, {UnitKind.FFN: 0.25}, floor=0.5).kept[UnitKind.FFN]
    assert (kept == kept[0]).all()
    assert kept[0].sum() == 8


@pytest.mark.parametrize("one_for_all", [True, False])
def test_random_selections_keep_the_budget(one_for_all: bool) -> None:
    table = importance(3, 2, 16)
    selection = allocate_random(
        NAMES[:3], table, {UnitKind.FFN: 0.25}, seed=1, floor=0.5, one_for_all=one_for_all
    ).kept[UnitKind.FFN]
    assert selection.sum(axis=(1, 2)).tolist() == [8, 8, 8]
    assert bool((selection == selection[0]).all()) is one_for_all


def test_recalibration_swaps_the_worst_own_unit_for_a_better_free_one() -> None:
    kept = np.array([[[1, 1, 0, 0, 0, 0]], [[1, 0, 1, 0, 0, 0]]], dtype=np.bool_)
    scores = np.array([[[9, 1, 0, 5, 0, 0]], [[9, 0, 7, 1, 2, 0]]], dtype=np.float64)
    selection = Selection(("a", "b"), {UnitKind.FFN: kept})
    after, swaps = swap_units(selection, {UnitKind.FFN: scores}, fraction=1.0, floor=0.0)
    assert swaps == 1
    assert after.kept[UnitKind.FFN].astype(int).tolist() == [[[1, 0, 0, 1, 0, 0]], [[1, 0, 1, 0, 0, 0]]]
    assert np.array_equal(selection.kept[UnitKind.FFN], kept), "the old selection must not change"


@given(seed=st.integers(0, 1000), kept=st.sampled_from([0.0, 0.3, 0.7, 1.0]), alike=st.booleans())
def test_where_nothing_can_be_swapped_nothing_is(seed: int, kept: float, alike: bool) -> None:
    generator = np.random.default_rng(seed)
    table = generator.random((3, 2, 4)) < kept
    selection = Selection(NAMES[:3], {UnitKind.FFN: np.repeat(table[:1], 3, axis=0) if alike else table})
    scores = {UnitKind.FFN: generator.random((3, 2, 4))}
    _, swaps = swap_units(selection, scores, fraction=1.0, floor=0.0)
    assert can_swap(selection) or swaps == 0
    assert not (can_swap(selection) and (alike or kept == 1.0))


def test_a_budget_of_one_takes_no_draft() -> None:
    """With 60,000 units the draft would take hours."""
    table = importance(3, 2, 30_000)
    selection = allocate(NAMES[:3], table, {UnitKind.FFN: 1.0}, core_fractions={UnitKind.FFN: 0.5}, floor=0.5)
    assert selection.kept[UnitKind.FFN].all()


def test_recalibration_keeps_budgets_and_floors() -> None:
    table = importance(3, 4, 32)
    selection = allocate(NAMES[:3], table, {UnitKind.FFN: 0.25}, core_fractions={UnitKind.FFN: 0.5}, floor=0.5)
    after, swaps = swap_units(selection, importance(3, 4, 32, seed=7), fraction=0.5, floor=0.5)
    kept = after.kept[UnitKind.FFN]
    assert swaps > 0
    assert kept.sum(axis=(1, 2)).tolist() == [32] * 3
    assert kept.sum(axis=2).min() >= 4
    assert np.array_equal(kept.all(axis=0), selection.kept[UnitKind.FFN].all(axis=0)), "the core stays"
