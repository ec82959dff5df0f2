"""Parity: is the engine the masked eager model of its context?

With e32, e64 the eager model in float32 and in float64 and g the engine, all maxima over the logits
of the same held-out text at several shapes:

    eager error  a = max |e32 - e64|        what float32 alone does to this model
    engine error b = max |g   - e64|        judged: b <= multiple * a
    difference   d = max |g   - e32|        reported as max_abs_error; d <= a + b

b is the right number to judge: it measures the engine against the exact result on the scale
of an error that nobody objects to, while d also contains the eager model's own rounding, and would
be 0 for an engine that repeats it and 2a for one that is just as good.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from cpcompile.models.language_model import LanguageModel
from cpcompile.validation.quality import IntArray, log_softmax

EngineRun = Callable[[IntArray], Mapping[str, npt.NDArray[Any]]]
"""input_ids (batch, sequence) -> every output that the engine has, by name."""

OUTPUT = "logits"
BATCHES_PER_SHAPE = 4
NUMBERS = ("max_abs_error", "max_abs_error_float64", "eager_float32_error", "mean_kl", "top1_agreement", "tokens")


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The compiler's correctness for one engine; true if it passes."""

    verdict: Literal["pass", "fail", "inconclusive"]
    reason: str | None = None
    """Why it is not a pass."""
    tolerance: float | None = None
    tolerance_source: str | None = None
    max_abs_error: float | None = None
    """Engine against the masked eager model in float32."""
    max_abs_error_float64: float | None = None
    """Engine against the masked eager model in float64: what `tolerance` is compared with."""
    eager_float32_error: float | None = None
    """The eager model in float32 against itself in float64."""
    mean_kl: float | None = None
    """Mean over the positions of KL(eager || engine) in nats."""
    top1_agreement: float | None = None
    """Fraction of positions where engine and eager model name the same token."""
    tokens: int | None = None
    """Positions compared."""
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """Field -> why it is null."""

    def __bool__(self) -> bool:
        return self.verdict == "pass"

    @classmethod
    def without_numbers(cls, verdict: Literal["fail", "inconclusive"], reason: str) -> Parity:
        """A verdict that was reached before there was anything to compare."""
        fields = (*NUMBERS, "tolerance", "tolerance_source")
        return cls(verdict=verdict, reason=reason, not_measured=dict.fromkeys(fields, reason))


@dataclass(frozen=True)
class EagerReference:
    """A masked eager model in float32, and the same weights in float64: made once per checkpoint.

    Casting takes the rotary frequencies along as they are in float32: both forms and the engine turn
    by the same angles, of which float64 only rounds less.
    """

    single: LanguageModel
    double: LanguageModel
    token_ids: IntArray | None = None
    """Of an engine with a part of the vocabulary: the model's id of each of its tokens."""

    @classmethod
    def of(cls, model: LanguageModel) -> EagerReference:
        """Both forms of `model`, in eval mode."""
        return cls(model.eval(), copy.deepcopy(model).double().eval())

    def logits(self, ids: IntArray, context: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """Logits (batch, sequence, vocabulary) in float32 and float64."""
        ids = ids if self.token_ids is None else self.token_ids[ids]
        arguments = (torch.from_numpy(ids), torch.tensor(context) if self.single.contexts else None)
        with torch.inference_mode():
            single, double = self.single(*arguments).numpy(), self.double(*arguments).numpy()
        return (
            (single, double) if self.token_ids is None else (single[..., self.token_ids], double[..., self.token_ids])
        )

    @property
    def vocabulary(self) -> int:
        return self.single.config.vocabulary if self.token_ids is None else len(self.token_ids)


def check_parity(
    engine_run: EngineRun,
    masked_model: EagerReference,
    context_index: int,
    token_windows: npt.NDArray[Any],
    shapes: Sequence[tuple[int, int]],
    multiple: float,
) -> Parity:
    """Compare engine and masked eager model on held-out text.

    `token_windows` holds ids in reading order, whatever its shape; each (batch, sequence) of `shapes` is
    filled BATCHES_PER_SHAPE times from its start, which repeats a text that is too short. A missing or
    additional output, a wrong shape or type, a value that is not finite or an engine that raises: fail.
    """
    if token_windows.size == 0:
        return Parity.without_numbers("inconclusive", "there is no held-out text of this context")
    vocabulary = masked_model.vocabulary
    eager_error = engine_error = difference = divergence = 0.0
    agreed = positions = 0
    for ids in _batches(token_windows, shapes):
        single, double = masked_model.logits(ids, context_index)
        try:
            outputs = engine_run(ids)
        except Exception as error:  # engines raise classes of their own, without a common base
            return Parity.without_numbers("fail", f"{_at(ids)}: the engine raised {type(error).__name__}: {error}")
        fault = _fault(outputs, ids, vocabulary) or _not_finite("the eager model", single, ids)
        if fault:
            return Parity.without_numbers("fail", fault)
        engine = outputs[OUTPUT]
        eager_error = max(eager_error, float(np.abs(single - double).max()))
        engine_error = max(engine_error, float(np.abs(engine - double).max()))
        difference = max(difference, float(np.abs(engine - single).max()))
        expected, actual = log_softmax(single), log_softmax(engine)
        divergence += float((np.exp(expected) * (expected - actual)).sum())
        agreed += int((single.argmax(axis=-1) == engine.argmax(axis=-1)).sum())
        positions += ids.size
    tolerance = multiple * eager_error
    within = engine_error <= tolerance
    return Parity(
        verdict="pass" if within else "fail",
        reason=None if within else f"engine error {engine_error:.3g} exceeds the tolerance {tolerance:.3g}",
        tolerance=tolerance,
        tolerance_source=(
            f"{multiple:g} x the eager model's own float32 error {eager_error:.3g} "
            f"(largest absolute difference from float64, {positions} positions)"
        ),
        max_abs_error=difference,
        max_abs_error_float64=engine_error,
        eager_float32_error=eager_error,
        mean_kl=divergence / positions,
        top1_agreement=agreed / positions,
        tokens=positions,
    )


def _batches(token_windows: npt.NDArray[Any], shapes: Sequence[tuple[int, int]]) -> Iterator[IntArray]:
    for batch, sequence in shapes:
        filled = np.resize(token_windows, (BATCHES_PER_SHAPE, batch, sequence))
        yield from filled.astype(np.int64)


def _fault(outputs: Mapping[str, npt.NDArray[Any]], ids: IntArray, vocabulary: int) -> str | None:
    """What makes the engine's outputs incomparable, if anything."""
    if set(outputs) != {OUTPUT}:
        return f"{_at(ids)}: the engine has the outputs {sorted(outputs)}, expected exactly [{OUTPUT!r}]"
    logits = outputs[OUTPUT]
    expected = (*ids.shape, vocabulary)
    if logits.shape != expected:
        return f"{_at(ids)}: {OUTPUT} has the shape {logits.shape}, expected {expected}"
    if logits.dtype != np.float32:
        return f"{_at(ids)}: {OUTPUT} is {logits.dtype}, expected float32"
    return _not_finite("the engine", logits, ids)


def _not_finite(whose: str, logits: npt.NDArray[Any], ids: IntArray) -> str | None:
    wrong = int((~np.isfinite(logits)).sum())
    return f"{_at(ids)}: {wrong} of {logits.size} logits of {whose} are NaN or infinite" if wrong else None


def _at(ids: IntArray) -> str:
    return f"batch {ids.shape[0]}, sequence {ids.shape[1]}"
