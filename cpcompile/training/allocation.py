"""Allocation: importance and budget -> which units each context keeps.

    core   the units that matter to every context: largest geometric mean of importance
    own    each context's further units, by importance relative to the other contexts,
           disjoint as long as there are free units

or, without specificity, the most important units of every context: they share what they agree on.

Units compete over all layers at once; a floor keeps every layer alive. The choice of a core with
disjoint own units over plain importance is measured, see `benchmarks/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from cpcompile.core.selection import BoolArray, Selection, UnitKind, Units
from cpcompile.training.importance import Importance, Scores


def allocate(
    contexts: tuple[str, ...],
    importance: Importance,
    budgets: Mapping[UnitKind, float],
    *,
    core_fractions: Mapping[UnitKind, float],
    specificity: float = 0.5,
    floor: float,
) -> Selection:
    """A core of its fraction of each budget, the rest each context's own; without a core where `specificity` <= 0."""
    return Selection(
        contexts,
        {
            kind: _allocate_kind(
                importance[kind],
                budget,
                core_fraction=core_fractions[kind],
                specificity=specificity,
                # A router chooses among the experts of its own layer: layers cannot lend each other any.
                floor=1.0 if kind is UnitKind.EXPERT else floor,
            )
            for kind, budget in budgets.items()
        },
    )


def allocate_one_for_all(
    contexts: tuple[str, ...], importance: Importance, budgets: Mapping[UnitKind, float], *, floor: float
) -> Selection:
    """One selection for all contexts: the control without contexts."""
    kept = {}
    for kind, budget in budgets.items():
        score = shares_of_context(importance[kind]).mean(axis=0)
        row = _top(score, kept_units(score.shape, budget), floor_units(score.shape, budget, floor))
        kept[kind] = np.broadcast_to(row, importance[kind].shape).copy()
    return Selection(contexts, kept)


def allocate_random(
    contexts: tuple[str, ...],
    importance: Importance,
    budgets: Mapping[UnitKind, float],
    *,
    seed: int,
    floor: float,
    one_for_all: bool,
) -> Selection:
    """Random selections of the same budget, one for all contexts or one for each: the controls of importance."""
    generator = np.random.default_rng(seed)
    kept = {}
    for kind, budget in budgets.items():
        shape = importance[kind].shape[1:]
        rows = [
            _top(generator.random(shape), kept_units(shape, budget), floor_units(shape, budget, floor))
            for _ in range(1 if one_for_all else len(contexts))
        ]
        kept[kind] = np.stack(rows * (len(contexts) if one_for_all else 1))
    return Selection(contexts, kept)


def kept_units(shape: tuple[int, ...], budget: float) -> int:
    """Units that a context keeps of a table (layers, units): the budget rounded, at least one a layer."""
    layers, units = shape[-2:]
    return max(layers, round(layers * units * budget))


def keeps_all(units: Units, budget: float) -> bool:
    """Whether nothing competes, so that importance decides nothing."""
    return kept_units((units.layers, units.count), budget) == units.layers * units.count


def floor_units(shape: tuple[int, ...], budget: float, floor: float) -> int:
    """Units that every layer keeps at least."""
    return max(1, int(shape[-1] * budget * floor))


def shares_of_context(importance: Scores) -> Scores:
    """Importance as a share of the context's total, so that contexts with larger losses do not decide for all."""
    total = importance.sum(axis=(-2, -1), keepdims=True)
    shares: Scores = importance / np.where(total > 0, total, 1.0)
    return shares


def _allocate_kind(
    importance: Scores, budget: float, *, core_fraction: float, specificity: float, floor: float
) -> BoolArray:
    contexts, layers, units = importance.shape
    shape = (layers, units)
    share = shares_of_context(importance)
    keep = kept_units(shape, budget)
    least = floor_units(shape, budget, floor)
    if keep == layers * units:  # no competition, and no long draft
        return np.ones_like(importance, dtype=np.bool_)

    logarithm = np.log(share + 1e-12)
    common = logarithm.mean(axis=0)
    if specificity <= 0:
        return np.stack([_top(score, keep, least) for score in (1 + specificity) * logarithm - specificity * common])
    core_size = round(keep * core_fraction)
    # Where own units are too few to fill the floors, the core has to be spread.
    spread = min(least, math.ceil(core_size / layers)) if keep - core_size < layers * least else 0
    core = _top(common, core_size, spread)
    kept = np.repeat(core[None], contexts, axis=0)
    # Between importance as such and importance relative to the others: the ratio alone finds
    # units that nobody needs (it ranks their noise), importance alone finds the same units for all.
    specific = logarithm - specificity * common
    owners = core.astype(np.int64) * contexts

    # A draft: contexts take turns, each picking the unit that is most its own among the least taken.
    while turn := [c for c in range(contexts) if kept[c].sum() < keep]:
        for context in turn:
            open_units = ~kept[context]
            starved = kept[context].sum(axis=1) < least
            if starved.any():
                open_units &= starved[:, None]
            open_units &= owners == owners[open_units].min()
            pick = np.unravel_index(np.where(open_units, specific[context], -np.inf).argmax(), shape)
            kept[context][pick] = True
            owners[pick] += 1
    return kept


def _top(score: Scores, count: int, least: int) -> BoolArray:
    """The `count` best units of a table (layers, units), `least` of them from every layer."""
    floor_first = score.copy()
    for row in floor_first:
        row[np.argsort(-row, kind="stable")[:least]] += np.inf
    kept = np.zeros(score.shape, dtype=np.bool_)
    kept.flat[np.argsort(-floor_first, axis=None, kind="stable")[:count]] = True
    return kept


def can_swap(selection: Selection) -> bool:
    """Whether recalibration can change anything: a context has own units, and there are units that no context holds."""
    return any(
        (table.any(axis=0) & ~table.all(axis=0)).any() and not table.any(axis=0).all()
        for table in selection.kept.values()
    )


def swap_units(selection: Selection, importance: Importance, *, fraction: float, floor: float) -> tuple[Selection, int]:
    """Recalibration: every context gives up its least important own units for more important free ones.

    At most `fraction` of its own units of a kind change (rounded up), only for units that no context holds, and
    no layer falls under the floor. Returns the selection and the number of units swapped.
    """
    swaps = 0
    kept = {}
    for kind, table in selection.kept.items():
        table = table.copy()
        contexts, layers, units = table.shape
        share = shares_of_context(importance[kind])
        least = floor_units((layers, units), float(table[0].mean()), floor)
        core = table.all(axis=0)
        for context in range(contexts):
            own = table[context] & ~core
            for _ in range(math.ceil(own.sum() * fraction)):
                free = ~table.any(axis=0)
                candidates = own & table[context] & (table[context].sum(axis=1, keepdims=True) > least)
                if not free.any() or not candidates.any():
                    break
                out = np.unravel_index(np.where(candidates, share[context], np.inf).argmin(), (layers, units))
                new = np.unravel_index(np.where(free, share[context], -np.inf).argmax(), (layers, units))
                if share[context][new] <= share[context][out]:
                    break
                table[context][out], table[context][new] = False, True
                swaps += 1
        kept[kind] = table
    return Selection(selection.contexts, kept), swaps
