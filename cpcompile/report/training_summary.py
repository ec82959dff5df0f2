"""The comparisons of a training run: its branches side by side, the swap matrix, and the findings in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PARTITION, DENSE = "partition", "dense-baseline"
LIKE_FOR_LIKE: Mapping[str, str] = {DENSE: "dense-distilled", "small-dense": "small-dense-distilled"}
"""Branches that are not distilled, and the controls that are the same with distillation."""
BRANCH_MEANING: Mapping[str, str] = {
    PARTITION: "the partitioned model",
    DENSE: "the dense parent trained on, ungated, for the same tokens and schedule",
}
NOISE = 0.002
"""Relative difference of perplexities within the noise of a single seed."""


@dataclass(frozen=True, kw_only=True)
class BranchSummary:
    """A trained branch: held-out perplexity per context, and their geometric mean."""

    description: str
    perplexity: Mapping[str, float]
    mean_perplexity: float


@dataclass(frozen=True, kw_only=True)
class SwapMatrix:
    """Perplexity of the text of each context (rows) with the units of each context (columns).

    With many contexts it is a sample: every row has its own context, and None where units were not tried.
    """

    contexts: tuple[str, ...]
    perplexity: tuple[tuple[float | None, ...], ...]

    @property
    def tried(self) -> int:
        """The other contexts whose units the first context was tried with; it is the same number for all."""
        return sum(value is not None for value in self.perplexity[0]) - 1


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """The branches by name, and the findings."""

    controls: Mapping[str, BranchSummary]
    swap_matrix: SwapMatrix | None
    findings: tuple[str, ...]
    distilled: bool
    """Whether the partitioned model learned from the dense baseline, which then cannot show alone what gates cost."""
    held_out_tokens: int | None
    """Tokens per context that the perplexities are of, or fewer where there are fewer; None if unknown."""


def mean_perplexity(perplexities: Sequence[float]) -> float:
    """Geometric mean: exp of the mean loss."""
    return math.exp(sum(math.log(value) for value in perplexities) / len(perplexities))


def summarize_training(training: Mapping[str, Any], contexts: Sequence[str]) -> TrainingSummary | None:
    """The branches of a training run side by side, and the findings; None if the checkpoint records none.

    training: the metadata of a checkpoint, with `perplexity` and optionally `controls`, `swap_matrix` and `settings`.
    """
    if "perplexity" not in training:
        return None
    branches = {
        name: {"description": BRANCH_MEANING.get(name, name), "perplexity": perplexity}
        for name, perplexity in training["perplexity"].items()
    } | dict(training.get("controls", {}))
    controls = {}
    for name, branch in branches.items():
        perplexity = {context: branch["perplexity"][context] for context in contexts}
        controls[name] = BranchSummary(
            description=branch["description"],
            perplexity=perplexity,
            mean_perplexity=mean_perplexity(list(perplexity.values())),
        )
    matrix = None
    if swap := training.get("swap_matrix"):
        matrix = SwapMatrix(contexts=tuple(swap["contexts"]), perplexity=tuple(map(tuple, swap["perplexity"])))
    settings = training.get("settings", {})
    distilled = settings.get("distill", 0) > 0 and settings.get("steps", 0) > 0
    findings = (*_branch_findings(controls, distilled=distilled), *(_swap_findings(matrix) if matrix else ()))
    return TrainingSummary(
        controls=controls,
        swap_matrix=matrix,
        findings=findings,
        distilled=distilled,
        held_out_tokens=settings.get("held_out_tokens"),
    )


def _branch_findings(controls: Mapping[str, BranchSummary], *, distilled: bool) -> Iterator[str]:
    """The partitioned model against every other branch, and which branch is best."""
    if PARTITION not in controls:
        return
    own = controls[PARTITION].mean_perplexity
    for name, branch in controls.items():
        if name == PARTITION:
            continue
        difference = own / branch.mean_perplexity - 1
        verb = "cannot be told apart from" if abs(difference) < NOISE else "beats" if difference < 0 else "loses to"
        figures = f"mean perplexity {own:.4g} against {branch.mean_perplexity:.4g} ({difference:+.1%})"
        if distilled and name in LIKE_FOR_LIKE and verb != "loses to":
            like = LIKE_FOR_LIKE[name]
            yield (
                f"The partitioned model is distilled, {name} ({branch.description}) is not: {figures}. "
                + (f"Like for like, compare with {like}." if like in controls else _unknown_part(like))
            )
        else:
            yield f"The partitioned model {verb} {name} ({branch.description}): {figures}."
    if len(controls) > 2:
        best = min(controls, key=lambda name: controls[name].mean_perplexity)
        yield f"The lowest mean perplexity is that of {best}: {controls[best].mean_perplexity:.4g}."


def _unknown_part(like: str) -> str:
    return f"How much of the difference is due to the distillation is not known; --controls {like} measures it."


def _swap_findings(matrix: SwapMatrix) -> Iterator[str]:
    """Whether each context does best with the units that were chosen for it."""
    contexts, at_home = matrix.contexts, True
    for index, (context, row) in enumerate(zip(contexts, matrix.perplexity, strict=True)):
        own = row[index]
        lowest, best = min((value, column) for column, value in enumerate(row) if value is not None)
        if own is not None and lowest < own:
            at_home = False
            yield (
                f"Text of {context} does better with the units of {contexts[best]} ({lowest:.4g}) "
                f"than with its own ({own:.4g})."
            )
    if at_home and matrix.tried < (others := len(contexts) - 1):
        compared = f"compared with those of {matrix.tried} of the {others} others"
        yield f"Every context does best with its own units, {compared}."
    elif at_home:
        yield "Every context does best with its own units: those of no other context give its text a lower perplexity."
