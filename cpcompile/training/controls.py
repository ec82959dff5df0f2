"""The training of controls (`cpcompile.core.controls`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cpcompile.core.controls import Choice, Control
from cpcompile.core.selection import BoolArray, Selection, UnitKind
from cpcompile.training.allocation import allocate_one_for_all, allocate_random, kept_units
from cpcompile.training.branch import BranchState
from cpcompile.training.importance import Importance, Scores
from cpcompile.training.run import Run
from cpcompile.training.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class ControlTrainer:
    """What the controls of a run start from."""

    run: Run
    parent: BranchState
    baseline: BranchState
    selection: Selection
    """The partitioned model's first."""
    importance: Importance
    budgets: Mapping[UnitKind, float]
    teacher: Teacher | None

    def perplexity(self, control: Control) -> dict[str, float]:
        """Train `control` and return its held-out perplexity per context."""
        run, chosen = self.run, self._choose(control.selection)
        if control.from_scratch:
            state = run.fresh()
            state.selection = chosen
        elif chosen is None:
            state = run.dense(self.parent)
        else:
            start = self.parent if control.trained else self.baseline
            state = run.gated(start, chosen, self.importance, one_for_all=control.one_for_all)
        if control.trained:
            first = 0 if control.from_scratch else run.config.dense_steps
            teacher = self.teacher if control.distilled else None
            state = run.branch(control.name, state, first=first, teacher=teacher)
        return run.perplexities(control.name, state)[0]

    def _choose(self, choice: Choice) -> Selection | None:
        contexts, config = self.run.corpus.contexts, self.run.config
        match choice:
            case Choice.ALL:
                return None
            case Choice.PARTITION:
                return self.selection
            case Choice.FIRST:
                return Selection(contexts, {k: _first_units(self.importance[k], b) for k, b in self.budgets.items()})
            case Choice.ONE_FOR_ALL:
                return allocate_one_for_all(contexts, self.importance, self.budgets, floor=config.floor)
            case Choice.RANDOM | Choice.RANDOM_ONE_FOR_ALL:
                return allocate_random(
                    contexts,
                    self.importance,
                    self.budgets,
                    seed=config.seed,
                    floor=config.floor,
                    one_for_all=choice is Choice.RANDOM_ONE_FOR_ALL,
                )


def _first_units(importance: Scores, budget: float) -> BoolArray:
    layers = importance.shape[1]
    kept = np.zeros(importance.shape, dtype=np.bool_)
    kept[:, :, : max(1, round(kept_units(importance.shape, budget) / layers))] = True
    return kept
