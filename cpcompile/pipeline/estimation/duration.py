"""How long a build and its validation take: the smallest build as a base, and what the model adds to it.

With T tensors, c contexts, K and D parameters of an engine and of the dense baseline, n tokens per run and F operations
a second of this machine's matrix products:

    build        smallest + T (CAPTURE + c FREEZE)
    a run        t(n) = T CALL + 2 K n / F           eager with D and EAGER_CALL
    validation   c times: parity, quality on the held-out text, coherence, timings, throughput, two processes, layers

CALL, EAGER_CALL, CAPTURE, FREEZE, SOFTMAX and LAYERS were measured on two cores, on models of 24 to 332 tensors. What
comes out is right within a factor of two: enough to decide between waiting and going for a walk.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from cpcompile.core.config import BuildConfig, ValidateConfig
from cpcompile.pipeline.estimation.facts import Facts
from cpcompile.validation.coherence import NEW_TOKENS, PROMPT_TOKENS, PROMPTS
from cpcompile.validation.language_reference import BATCHES_PER_SHAPE
from cpcompile.validation.speed import SETTLE_SECONDS, WARM_UP_RUNS
from cpcompile.validation.throughput import ROUNDS, RUNS, SECONDS

CAPTURE, FREEZE = 0.06, 0.01
"""Seconds per tensor, once and for each context."""
CALL, EAGER_CALL = 1e-5, 1.2e-4
"""Seconds per tensor of a run in the engine and in torch, however few tokens it has."""
SOFTMAX = 1.5e-8
"""Seconds per logit of its probability in float64."""
LAYERS = 0.05
"""Seconds per tensor of the errors of the layers."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What this machine needs for the smallest build, and its speed in matrix products of float32."""

    build_seconds: float
    validation_seconds: float
    operations: float
    """Per second."""


def measure_operations() -> float:
    """Operations per second of a product that is large enough for all cores."""
    matrix = torch.ones(512, 512)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        _ = matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return float(2 * 512**3 / best)


def build_seconds(facts: Facts, pace: Pace) -> float:
    """The stages that a report counts as the build."""
    return pace.build_seconds + facts.tensors * (CAPTURE + len(facts.contexts) * FREEZE)


def validation_seconds(facts: Facts, pace: Pace, config: BuildConfig, validation: ValidateConfig) -> float | None:
    """The validation of all engines; None for a program, of whose runs nothing is known before they run."""
    if facts.result_elements is not None:
        return None
    engines = [context.kept_bytes for context in facts.contexts.values()] * (2 if config.merged else 1)
    return pace.validation_seconds + sum(_of_engine(facts, kept, pace, validation) for kept in engines)


def _of_engine(facts: Facts, kept_bytes: int, pace: Pace, validation: ValidateConfig) -> float:
    def engine(tokens: int) -> float:
        return facts.tensors * CALL + 2 * kept_bytes / 4 * tokens / pace.operations

    def eager(tokens: int) -> float:
        return facts.tensors * EAGER_CALL + 2 * (facts.dense_bytes or facts.bytes) / 4 * tokens / pace.operations

    compared = sum(engine(b * s) + 4 * eager(b * s) for b, s in validation.shapes) * BATCHES_PER_SHAPE  # float64, too
    generated = PROMPTS * (PROMPT_TOKENS + NEW_TOKENS // 2)
    scored = facts.text_tokens // 512 * (engine(512) + eager(512)) + 2 * facts.text_tokens * facts.classes * SOFTMAX
    if validation.coherence:
        scored += NEW_TOKENS * (engine(generated) + eager(generated))
    seconds = compared + scored
    if validation.layers:
        seconds += facts.tensors * LAYERS
    if validation.memory:
        seconds += pace.validation_seconds / 2  # the engine's process; that of the eager model is started once
    if validation.speed:
        for batch, sequence in validation.speed_shapes:
            for run in (engine(batch * sequence), eager(batch * sequence)):
                seconds += validation.rounds * (max(SETTLE_SECONDS, run) + 1.5 * run) + WARM_UP_RUNS[0] * 2 * run
        batch, sequence = validation.speed_shapes[0]
        for run in (engine(batch * sequence), eager(batch * sequence)):
            seconds += min(ROUNDS, validation.rounds) * max(SECONDS, RUNS * run)
    return seconds


def in_words(seconds: float | None) -> str:
    """`about 20 s`, `about 3 min`, `about 2 h`."""
    if seconds is None:
        return "a time that is not known before it has run"
    for unit, size, limit in (("s", 1, 90), ("min", 60, 90), ("h", 3600, float("inf"))):
        if seconds < limit * size:
            number = seconds / size
            return f"about {number:.0f} {unit}" if number >= 1 else f"less than 1 {unit}"
    raise AssertionError
