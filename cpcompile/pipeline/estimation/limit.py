"""Stop before the work starts, instead of when memory runs out."""

from __future__ import annotations

from pathlib import Path

from cpcompile.core.config import BuildConfig, ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.types import Progress
from cpcompile.machine.memory import available_memory, resident_bytes
from cpcompile.pipeline.estimation.facts import Facts, read_facts
from cpcompile.pipeline.estimation.formula import BESIDE, JOBS, ONE_SEQUENCE, Estimate, RunShape, estimate
from cpcompile.pipeline.estimation.libraries import Libraries, measure_libraries
from cpcompile.report.formats import megabytes


def estimate_build(
    model: Path,
    config: BuildConfig,
    validation: ValidateConfig,
    shape: RunShape = ONE_SEQUENCE,
    progress: Progress = lambda *_: None,
) -> Estimate:
    """What a build of `model` will take; UsageError for a file or settings from which nothing can be built."""
    facts = _facts(model, config)
    progress("estimate", 0, None)
    libraries = measure_libraries(facts.model_type)
    return estimate(facts, libraries, config, validation, shape)


def check_memory(
    model: Path,
    limit: int | None,
    config: BuildConfig,
    validation: ValidateConfig,
    progress: Progress = lambda *_: None,
) -> str | None:
    """Raise UsageError if work on `model` needs more than `limit`; warn if it may need more than is available.

    Without a limit nothing is measured if the work certainly fits.
    """
    available = available_memory()
    if limit is None and (available is None or _bound(_facts(model, config), config, validation) <= available):
        return None
    estimated = estimate_build(model, config, validation, progress=progress)
    if limit is not None:
        require_memory(estimated, limit)
    return memory_warning(estimated, available) if available is not None else None


def require_memory(estimated: Estimate, limit: int) -> None:
    """Raise UsageError if the work needs more than the user's `limit` in bytes."""
    if estimated.largest.peak_rss_bytes > limit:
        raise UsageError(f"--max-memory allows {megabytes(limit)}, {_needs(estimated, limit)}")


def memory_warning(estimated: Estimate, available: int) -> str | None:
    """A warning if the work may need more than is available; an estimate is not a reason to refuse it."""
    if estimated.largest.peak_rss_bytes <= available:
        return None
    return f"{megabytes(available)} of memory are available, {_needs(estimated, available)}"


def _facts(model: Path, config: BuildConfig) -> Facts:
    """Facts of `model` for a build as `config` says."""
    facts = read_facts(model, contexts=config.contexts, coverage=config.vocabulary_coverage)
    config.require_compatible(tuple(facts.contexts))
    return facts


def _bound(facts: Facts, config: BuildConfig, validation: ValidateConfig) -> int:
    """An upper bound: libraries never grow to twice their size once a build is imported."""
    held = resident_bytes()
    libraries = Libraries(build=2 * held, validation=2 * held, engine=held, eager=held)
    return estimate(facts, libraries, config, validation).largest.peak_rss_bytes


def _needs(estimated: Estimate, limit: int) -> str:
    """How much is needed, where, and what would help."""
    largest, alone = estimated.largest, estimated.process_peak_rss_bytes
    needed = f"about {megabytes(largest.peak_rss_bytes)} are needed at the peak ({largest.name})"
    if BESIDE in largest.parts and alone <= limit:
        return f"{needed}; --no-memory skips the separate measuring process and needs {megabytes(alone)}"
    if JOBS in largest.parts:
        return f"{needed}; fewer --jobs need less"
    return f"{needed}; contexts are built one after the other, so only a smaller model or a larger machine helps"
