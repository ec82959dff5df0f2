"""One engine against the eager model that it was compiled from: parity and quality, for which time does not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from cpcompile.bundle.reader import Bundle, Variant
from cpcompile.core.cache import INPUT, OUTPUT
from cpcompile.core.config import ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Feeds, Steps, unwatched
from cpcompile.machine.memory import release_memory
from cpcompile.report.results import Parity, Quality
from cpcompile.runtime.engine import Engine, load_engine
from cpcompile.runtime.plan import load_plan, why_not_taken
from cpcompile.validation.parity import check_parity
from cpcompile.validation.reference import UNROUNDED, Outputs, Reference, Run, Schemes
from cpcompile.validation.rounded_model import schemes_of, schemes_of_plan


@dataclass(frozen=True)
class EngineComparison:
    """What an engine computes, beside the eager model."""

    parity: Parity
    quality: Quality


Compared: TypeAlias = Mapping[tuple[str, str], EngineComparison]
"""By context and name of the engine."""
NOT_COMPARED: Compared = {}


def compare_engine(
    bundle: Bundle,
    variant: Variant,
    reference: Reference,
    config: ValidateConfig,
    *,
    threads: int,
    part: Callable[[str], Steps] = lambda _name: unwatched,
) -> EngineComparison:
    """Parity and quality of an engine that can run here; CpcompileError if it cannot be loaded.

    part: by its name, the progress of a part of the work.
    """
    context = variant.context
    engine = load_plan(variant) if variant.plan else load_engine(bundle, context, variant.name, threads=threads)
    if variant.plan:
        schemes = schemes_of_plan(variant.plan)
    else:
        schemes = schemes_of(engine) if isinstance(engine, Engine) else {}
    # Where one number scales all inputs of a product, logits depend on which tokens are computed together.
    steady = all(scheme.block is not None for scheme in schemes.values())
    cached = partial(_in_two_steps, engine) if isinstance(engine, Engine) and engine.has_cache and steady else None
    parity = compare_outputs(engine.outputs, reference, context, config, variant, part("parity"), cached, schemes)
    if (failed := incomparable(parity)) is not None:
        return EngineComparison(parity, reference.quality(context, failed))
    return EngineComparison(parity, _quality(engine.outputs, reference, context, part("quality")))


def incomparable(parity: Parity) -> NotMeasured | None:
    """The reason, if outputs cannot be compared: there is nothing to score, and no point in timing the engine."""
    apart = parity.verdict == "fail" and isinstance(parity.max_abs_error, NotMeasured)
    return NotMeasured(f"parity failed: {parity.reason}") if apart else None


def compare_outputs(
    run: Run,
    reference: Reference,
    context: str,
    config: ValidateConfig,
    variant: Variant | None = None,
    steps: Steps = unwatched,
    cached: Run | None = None,
    schemes: Schemes = UNROUNDED,
) -> Parity:
    """The parity of `run` on the inputs of `context`.

    variant: what runs, unless it is a peer, which is in float32 and takes every shape. cached: the same with a cache.
    """
    inputs, missing = _counted(lambda: reference.inputs(context), steps), reference.no_inputs
    if variant is not None and variant.plan:
        inputs = (feeds for feeds in inputs if why_not_taken(variant, feeds) is None)
        missing += ", or none of a shape that the engine takes"
    rounds_inputs = any(not each.products_only for each in schemes.values())
    parity = check_parity(
        run,
        reference.masked(context, schemes),
        reference.exact(context, schemes),
        inputs,
        config.tolerance_multiple,
        logits=reference.logits,
        missing=missing,
        precision=_computes_in(variant) if variant is not None else "fp32",
        cached=cached,
        unrounded=reference.masked(context, schemes, round_inputs=False) if rounds_inputs else None,
    )
    release_memory()  # of the model in float64
    return parity


def _in_two_steps(engine: Engine, feeds: Feeds) -> Outputs:
    """The logits of input_ids (batch, sequence); the second half goes on with the cache of the first."""
    ids = feeds[INPUT]
    first, cache = engine.step(ids[:, : (ids.shape[1] + 1) // 2])
    if ids.shape[1] == 1:
        return {OUTPUT: first}
    second, _ = engine.step(ids[:, first.shape[1] :], cache)
    return {OUTPUT: np.concatenate([first, second], axis=1)}


def _computes_in(variant: Variant) -> str:
    """The precision of what is not rounded."""
    return "fp16" if variant.plan and variant.plan.rounded else variant.precision


def _counted(inputs: Callable[[], Iterator[Feeds]], steps: Steps) -> Iterator[Feeds]:
    """Inputs, each of which is done when the next one is asked for."""
    total = sum(1 for _ in inputs())
    for done, feeds in enumerate(inputs()):
        steps(done, total)
        yield feeds
    steps(total, total)


def _quality(run: Run, reference: Reference, context: str, steps: Steps) -> Quality:
    try:
        return reference.quality(context, run, steps=steps)
    except UsageError as error:  # of a plan whose profiles do not take the windows of the text
        return reference.quality(context, NotMeasured(str(error)))
