"""Controls: further branches, which show what a part of the method is worth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cpcompile.core.selection import BoolArray, Selection, UnitKind
from cpcompile.training.allocation import Scores, allocate_one_for_all, allocate_random, kept_units
from cpcompile.training.branch import BranchState
from cpcompile.training.importance import Importance
from cpcompile.training.run import Run
from cpcompile.training.teacher import Teacher

CONTROL_MEANING: Mapping[str, str] = {
    "one-mask": "one selection and one gate scale for all contexts at the same budget, trained like the "
    "partitioned model: what pruning gives",
    "importance-only": "the partitioned model's first selection on the dense baseline, without training",
    "random-one": "one random selection and one gate scale for all contexts, trained like the partitioned model",
    "random-per-context": "a random selection per context, trained like the partitioned model",
    "small-dense": "a dense model of the active size from scratch, same tokens and schedule",
    "small-dense-distilled": "a dense model of the active size from scratch, distilled like the partitioned model",
    "dense-distilled": "the dense parent trained on whole, distilled like the partitioned model",
}


def train_control(
    name: str,
    run: Run,
    parent: BranchState,
    baseline: BranchState,
    selection: Selection,
    importance: Importance,
    budgets: Mapping[UnitKind, float],
    teacher: Teacher | None,
) -> dict[str, float]:
    """Train the control `name` and return its held-out perplexity per context."""
    contexts, config = run.corpus.contexts, run.config
    if name == "importance-only":
        return run.perplexity(run.gated(baseline, selection, importance))
    if name == "dense-distilled":
        return run.perplexity(run.branch(name, run.dense(parent), teacher=teacher))
    if name in ("small-dense", "small-dense-distilled"):
        # The first units of every layer, for every context, from scratch and without gates: a smaller dense model.
        small = run.fresh()
        small.selection = Selection(contexts, {k: _first_units(importance[k], b) for k, b in budgets.items()})
        distilled = teacher if name == "small-dense-distilled" else None
        return run.perplexity(run.branch(name, small, first=0, teacher=distilled))
    if name == "one-mask":
        chosen = allocate_one_for_all(contexts, importance, budgets, floor=config.floor)
    else:
        chosen = allocate_random(
            contexts, importance, budgets, seed=config.seed, floor=config.floor, one_for_all=name == "random-one"
        )
    state = run.gated(parent, chosen, importance, one_for_all=name in ("one-mask", "random-one"))
    return run.perplexity(run.branch(name, state, teacher=teacher))


def _first_units(importance: Scores, budget: float) -> BoolArray:
    layers = importance.shape[1]
    kept = np.zeros(importance.shape, dtype=np.bool_)
    kept[:, :, : max(1, round(kept_units(importance.shape, budget) / layers))] = True
    return kept
