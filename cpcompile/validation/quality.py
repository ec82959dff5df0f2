"""Quality: perplexity and next-token accuracy on held-out text, engine against dense baseline.

    loss = -mean log softmax(logits)[next token],   perplexity = exp(loss)

An engine with a trimmed vocabulary may need more tokens for the same text: its perplexity is exp(loss * ratio), per
token of the whole vocabulary, so that both sides refer to the same text.

Log-sum-exp and sums are float64, over the same windows on both sides: every token is predicted
once; the first token of text in a window is only context, and so are the tokenizer's own leading tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpcompile.core.measured import NotMeasured
from cpcompile.core.probabilities import log_softmax
from cpcompile.core.types import Array
from cpcompile.report.results import Quality
from cpcompile.text.corpus import cut_windows

IntArray = npt.NDArray[np.int64]
Run = Callable[[IntArray], npt.NDArray[Any]]
"""input_ids (batch, sequence) -> logits (batch, sequence, vocabulary)."""

SHORT_TEXT = "the held-out text is too short to be continued"
NOT_ASKED = NotMeasured("coherence measurements were switched off")


BATCH = 4
"""Windows that are run at a time."""
PIECE = 2**22
"""Logits that are turned into float64 at a time: 32 MiB, of which three copies are needed."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well one model predicts the held-out text."""

    perplexity: float
    accuracy: float
    """Fraction of tokens that the likeliest logit names."""
    tokens: int
    coherence: Array | NotMeasured = NOT_ASKED
    """Of every prompt, see `coherence`."""
    ratio: float = 1.0
    """Tokens of the text per token of the whole vocabulary; the perplexity is per the latter."""


def consecutive_windows(ids: npt.NDArray[Any], sequence: int, leading: Sequence[int] = ()) -> IntArray:
    """Consecutive windows (n, sequence + 1) that start with `leading`; the last id of one is the next one's first text.

    Text shorter than one window gives a single short window; fewer than two ids, or no room for text, give none.
    """
    taken = min(sequence - len(leading), len(ids) - 1)
    if taken < 1:
        return np.zeros((0, sequence + 1), dtype=np.int64)
    return cut_windows(ids, np.arange((len(ids) - 1) // taken) * taken, taken, leading)


def measure_score(run: Run, windows: IntArray, *, leading: int = 0, batch: int = BATCH, ratio: float = 1.0) -> Score:
    """Score `run` on windows (n, length + 1), `batch` of them at a time; their first `leading` ids are no text.

    ratio: tokens of the text here per token of the whole vocabulary; the perplexity is then per the latter.
    """
    losses, right = zip(*_scored(run, windows, leading, batch), strict=True)
    tokens = windows[:, leading + 1 :].size
    perplexity = _exp(sum(losses) / tokens * ratio)
    return Score(perplexity=perplexity, accuracy=sum(right) / tokens, tokens=tokens, ratio=ratio)


def window_losses(run: Run, windows: IntArray, *, leading: int = 0, batch: int = BATCH, ratio: float = 1.0) -> Array:
    """The mean loss of each window, in nats per token of the whole vocabulary; parameters as for `measure_score`."""
    tokens = windows.shape[1] - leading - 1
    losses: Array = np.array([loss for loss, _ in _scored(run, windows, leading, batch)])
    losses *= ratio / tokens
    return losses


def _scored(run: Run, windows: IntArray, leading: int, batch: int) -> Iterator[tuple[float, int]]:
    """Of each window the sum of its losses, and how often the likeliest logit names the next token."""
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        for logits, labels in zip(run(part[:, :-1])[:, leading:], part[:, leading + 1 :], strict=True):
            loss, right, rows = 0.0, 0, max(1, PIECE // logits.shape[-1])
            for first in range(0, len(labels), rows):
                expected = labels[first : first + rows]
                log_probabilities = log_softmax(logits[first : first + rows])
                loss -= float(np.take_along_axis(log_probabilities, expected[:, None], axis=-1).sum())
                right += int((log_probabilities.argmax(axis=-1) == expected).sum())
            yield loss, right


def compare_quality(engine: Score | NotMeasured, dense: Score | NotMeasured) -> Quality:
    """Combine both sides."""
    sides: dict[str, Any] = _coherence(engine, dense)
    for prefix, side in (("", engine), ("dense_", dense)):
        for name in ("perplexity", "accuracy"):
            value = side if isinstance(side, NotMeasured) else getattr(side, name)
            if name == "accuracy" and isinstance(engine, Score) and engine.ratio != 1:
                value = NotMeasured(
                    f"the trimmed vocabulary cuts the text into {engine.ratio:.3f} times the tokens: not comparable"
                )
            sides[prefix + name] = value
    for name, value in sides.items():
        if isinstance(value, float) and not math.isfinite(value):
            sides[name] = NotMeasured(f"{name} is {value}: the logits are not finite or rule out a token that occurs")
    return Quality(**sides, tokens=engine if isinstance(engine, NotMeasured) else engine.tokens)


def _coherence(engine: Score | NotMeasured, dense: Score | NotMeasured) -> dict[str, Any]:
    """The means over the prompts with their standard errors, and the standard error of their difference.

    Both sides continue the same prompts, so the difference is taken prompt by prompt. A trimmed vocabulary cuts the
    text into other prompts; then the errors of both sides add up.
    """
    own, other = (side if isinstance(side, NotMeasured) else side.coherence for side in (engine, dense))
    found: dict[str, Any] = {}
    for prefix, values in (("", own), ("dense_", other)):
        found[f"{prefix}coherence"] = values if isinstance(values, NotMeasured) else float(values.mean())
        found[f"{prefix}coherence_error"] = values if isinstance(values, NotMeasured) else standard_error(values)
    error: float | NotMeasured
    if isinstance(own, NotMeasured):
        error = own
    elif isinstance(other, NotMeasured):
        error = other
    elif isinstance(engine, Score) and engine.ratio != 1:
        error = math.hypot(standard_error(own), standard_error(other))
    else:
        error = standard_error(own - other)
    return found | {"coherence_difference_error": error}


def standard_error(values: Array) -> float:
    """The standard error of the mean of independent `values`."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
