"""Parity: is the engine the masked eager model of its context?

With e32, e64 the eager model in float32 and in float64 and g the engine, all maxima over one output on the same
inputs of several shapes:

    eager error  a = max |e32 - e64|        what float32 alone does to this model
    engine error b = max |g   - e64|        judged: b <= multiple * a
    difference   d = max |g   - e32|        reported as max_abs_error; d <= a + b

b is the number to judge: it measures the engine against the exact result on the scale
of an accepted error, while d also contains the eager model's own rounding, and would
be 0 for an engine that repeats it and 2a for one that is just as good. Where float32 happens to be exact, one
rounding of the output's largest value stands for a. An engine in float16 or bfloat16 may be off by as much more as
that rounds more coarsely than float32. Of several outputs the one nearest to its tolerance is reported.

A quantised engine rounds the inputs of its products when it runs, and so does the eager model that it is compared with.
Where float32 puts an input on the other side of a tie, it goes to the next whole number: a step that has nothing to do
with float32's own error, and that may happen on one side alone. One step can change a logit as much as all the
roundings of its text do, but most logits do not change at all. So b may also be

    q = max |eager model without rounded inputs - e32|      if mean |g - e32| <= SHARE * mean |… - e32|

The ratios of `array_errors` of the same output against float64 are reported as well; the verdict ignores them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cpcompile.core.measured import NotMeasured
from cpcompile.core.probabilities import log_softmax
from cpcompile.core.types import Array, Feeds
from cpcompile.report.results import Parity, Verdict
from cpcompile.validation.array_errors import PIECE, ArrayErrors, pieces
from cpcompile.validation.reference import Outputs, Run

FLOAT32_ROUNDING = float(np.finfo(np.float32).eps)
COARSER: Mapping[str, int] = {"fp16": 2**13, "bf16": 2**16}
"""How many times as coarsely as float32 a precision rounds: 11 and 8 bits of significand instead of 24."""
SHARE = 0.25
"""The part of what rounding inputs changes on average that single steps may change."""
THROUGH_CACHE = "logits through the cache"
NO_LOGITS = "the model gives no logits"


@dataclass
class _Errors:
    """Errors of one output over all inputs so far."""

    engine: ArrayErrors = field(default_factory=ArrayErrors)
    eager: float = 0.0
    difference: float = 0.0
    rounding: float = 0.0
    """The most that rounding the inputs of products changes in the eager model."""
    changed: float = 0.0
    """The sum of what it changes."""
    apart: float = 0.0
    """The sum of what the engine differs by from the eager model."""

    def add(self, single: Array, double: Array, engine: Array, unrounded: Array | None) -> None:
        """Add one run; `unrounded`: the same as `single`, without rounded inputs."""
        if unrounded is not None:
            change = np.abs(unrounded - single)
            self.rounding = max(self.rounding, float(change.max()))
            self.changed += float(change.sum(dtype=np.float64))
            self.apart += float(np.abs(engine - single).sum(dtype=np.float64))
        self.engine.add(double, engine)
        for expected, exact, actual in pieces(single, double, engine):
            self.eager = max(self.eager, float(np.abs(expected - exact).max()))
            self.difference = max(self.difference, float(np.abs(actual - expected).max()))

    @property
    def noise(self) -> float:
        """The eager model's own error, at least one rounding of the largest value."""
        return max(self.eager, FLOAT32_ROUNDING * self.engine.largest)

    def tolerance(self, multiple: float) -> float:
        """What the engine may differ by."""
        steps = self.rounding if self.apart <= SHARE * self.changed else 0.0
        return max(multiple * self.noise, steps)


@dataclass
class _Agreement:
    """Divergence and agreement of the logits over all positions so far."""

    positions: int = 0
    divergence: float = 0.0
    first: int = 0
    among_five: int = 0

    def add(self, expected: Array, actual: Array) -> None:
        """Add one run, PIECE elements at a time."""
        classes = expected.shape[-1]
        rows = max(1, PIECE // max(1, classes))
        flat = [logits.reshape(-1, classes) for logits in (expected, actual)]
        for start in range(0, len(flat[0]), rows):
            right, own = (log_softmax(logits[start : start + rows]) for logits in flat)
            self.divergence += float((np.exp(right) * (right - own)).sum())
            best = right.argmax(axis=-1, keepdims=True)
            likelier = (own > np.take_along_axis(own, best, axis=-1)).sum(axis=-1)
            self.first += int((best[..., 0] == own.argmax(axis=-1)).sum())
            self.among_five += int((likelier < 5).sum())
            self.positions += len(right)

    def numbers(self) -> dict[str, Any]:
        """The fields of `Parity` that concern logits."""
        names = ("mean_kl", "top1_agreement", "top5_agreement")
        if not self.positions:
            return dict.fromkeys((*names, "tokens"), NotMeasured(NO_LOGITS))
        sums = (self.divergence, self.first, self.among_five)
        return {name: each / self.positions for name, each in zip(names, sums, strict=True)} | {
            "tokens": self.positions
        }


def check_parity(
    engine: Run,
    single: Run,
    double: Run,
    inputs: Iterable[Feeds],
    multiple: float,
    *,
    logits: str | None,
    missing: str,
    precision: str = "fp32",
    cached: Run | None = None,
    unrounded: Run | None = None,
) -> Parity:
    """Compare `engine` with the masked eager model in float32 and float64 on `inputs`.

    A missing or additional output, a wrong shape or type, a value that is not finite or an engine that raises: fail.
    `logits` names the output of which divergence and agreement are taken. Without inputs it is inconclusive: `missing`.
    An engine in another `precision` may be off by as much more as that rounds more coarsely. `cached` is the same
    engine, reading its tokens in two steps; its logits are one more output. `unrounded`: of a quantised engine, the
    eager model with its rounded weights that does not round the inputs of products.
    """
    errors: dict[str, _Errors] = {}
    agreement = _Agreement()
    for feeds in inputs:
        expected, exact = single(feeds), double(feeds)
        plain = unrounded(feeds) if unrounded is not None else {}
        try:
            actual = engine(feeds)
        except Exception as error:  # engines raise classes of their own, without a common base
            return _no_numbers("fail", f"{_at(feeds)}: the engine raised {type(error).__name__}: {error}")
        fault = _fault(actual, expected)
        if fault:
            return _no_numbers("fail", f"{_at(feeds)}: {fault}")
        for name in expected:
            if expected[name].dtype.kind == "f":
                errors.setdefault(name, _Errors()).add(expected[name], exact[name], actual[name], plain.get(name))
        if logits is not None:
            agreement.add(expected[logits], actual[logits])
        if logits is not None and cached is not None:
            in_steps = cached(feeds)[logits]
            if fault := _fault({logits: in_steps}, {logits: expected[logits]}):
                return _no_numbers("fail", f"{_at(feeds)}, {THROUGH_CACHE}: {fault}")
            through = errors.setdefault(THROUGH_CACHE, _Errors())
            through.add(expected[logits], exact[logits], in_steps, plain.get(logits))
        del expected, exact, actual, plain  # before the next ones are there
    if not errors:
        return _no_numbers("inconclusive", missing)
    coarser = COARSER.get(precision, 1)
    name, worst = max(errors.items(), key=lambda item: item[1].engine.max_abs / (item[1].tolerance(multiple) or 1.0))
    tolerance = worst.tolerance(multiple * coarser)
    scale = f"{coarser} (times as coarsely {precision} rounds) x " if coarser > 1 else ""
    farthest = worst.engine.max_abs
    within = farthest <= tolerance
    where = f" in {name}" if len(errors) > 1 else ""
    positions = agreement.positions
    counted = f", {positions} positions" if positions else ""
    if tolerance > multiple * coarser * worst.noise:
        source = f"what rounding the inputs of products changes in the eager model{where} (largest absolute difference"
        source += f"{counted}; both with the engine's rounded weights)"
    else:
        source = f"{multiple:g} x {scale}the eager model's own float32 error {worst.noise:.3g}{where}"
        rounded = "; both with the engine's rounded weights" if unrounded is not None else ""
        source += f" (largest absolute difference from float64{counted}{rounded})"
    ratios: dict[str, Any] = {**worst.engine.ratios()}
    return Parity(
        verdict="pass" if within else "fail",
        reason=None if within else f"engine error {farthest:.3g}{where} exceeds the tolerance {tolerance:.3g}",
        tolerance=tolerance,
        tolerance_source=source,
        max_abs_error=worst.difference,
        max_abs_error_float64=farthest,
        eager_float32_error=worst.eager,
        **ratios,
        **agreement.numbers(),
    )


def _no_numbers(verdict: Verdict, reason: str) -> Parity:
    """A verdict that was reached before there was anything to compare."""
    return Parity.without(reason, verdict=verdict, reason=reason)


def _fault(actual: Outputs, expected: Outputs) -> str | None:
    """What makes the engine's outputs incomparable, if anything."""
    if set(actual) != set(expected):
        return f"the engine has the outputs {sorted(actual)}, expected exactly {sorted(expected)}"
    for name, array in expected.items():
        own = actual[name]
        if own.shape != array.shape:
            return f"{name} has the shape {own.shape}, expected {array.shape}"
        if own.dtype != array.dtype:
            return f"{name} is {own.dtype}, expected {array.dtype}"
        if array.dtype.kind != "f":
            if different := int((own != array).sum()):
                return f"{different} of {own.size} elements of {name} differ"
            continue
        for whose, values in (("the eager model", array), ("the engine", own)):
            if wrong := int((~np.isfinite(values)).sum()):
                return f"{wrong} of {values.size} values of {name} of {whose} are NaN or infinite"
    return None


def _at(feeds: Feeds) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
