"""Make a report of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpcompile.core.measured import NotMeasured
from cpcompile.core.selection import Digits
from cpcompile.machine.environment import Environment
from cpcompile.report.contents import (
    BuildResult,
    BundleSizes,
    ContextResult,
    LayerSelection,
    ModelInfo,
    Report,
    SelectionSummary,
)
from cpcompile.report.training_summary import TrainingSummary
from cpcompile.report.verdict import judge

DENSE_SIZE_UNKNOWN = "the size of the dense model is unknown"


def make_report(
    *,
    model: ModelInfo,
    environment: Environment,
    build: BuildResult,
    bundle_bytes: int,
    dense_bytes: int | None,
    shared_weights: bool,
    contexts: Sequence[ContextResult],
    selection: Digits | NotMeasured,
    training: TrainingSummary | None,
    max_perplexity_increase: float | None,
    stored_once: int = 0,
    conditions: Mapping[str, str] | None = None,
) -> Report:
    """The report with its verdict.

    dense_bytes: weights of the dense model in the bundle's precision, None where unknown. selection: contexts without
    a place in the report are left out. max_perplexity_increase: what the verdict allows; None where quality is not
    measured as perplexity. stored_once: as in `judge`.
    """
    bundle = BundleSizes(
        bytes=bundle_bytes,
        dense_bytes=NotMeasured(DENSE_SIZE_UNKNOWN) if dense_bytes is None else dense_bytes,
        shared_weights=shared_weights,
    )
    verdict, reasons = judge(contexts, bundle, max_perplexity_increase, stored_once=stored_once)
    return Report(
        verdict=verdict,
        reasons=reasons,
        model=model,
        environment=environment,
        build=build,
        bundle=bundle,
        contexts=tuple(contexts),
        selection=SelectionSummary(kinds=_kinds(selection, [context.name for context in contexts])),
        training=training,
        conditions=conditions or {},
    )


def _kinds(
    selection: Digits | NotMeasured, contexts: Sequence[str]
) -> dict[str, tuple[LayerSelection, ...]] | NotMeasured:
    if isinstance(selection, NotMeasured):
        return selection
    return {
        kind: tuple(
            LayerSelection(name=layer["name"], kept={c: layer["kept"][c] for c in contexts}) for layer in layers
        )
        for kind, layers in selection.items()
    }
