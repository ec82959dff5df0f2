"""`cpcompile calibrate`: checkpoint and text -> what its parameters are rounded to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpcompile.core.config import ROUNDED
from cpcompile.core.errors import UsageError
from cpcompile.core.paths import calibration_path
from cpcompile.core.rounding import SCHEMES
from cpcompile.core.types import Progress
from cpcompile.frontend.calibration import require_free, save_calibration
from cpcompile.frontend.source import TrainedSource, open_source
from cpcompile.validation.calibration import calibrated


def calibrate_model(
    model: Path, data: Path, *, tokens: int, precisions: Sequence[str] = ROUNDED, progress: Progress
) -> Path:
    """Write the calibration of `model` beside it, for engines in those `precisions`.

    It reads at most so many `tokens` of the text in `data` for each context. What training held out, and quality is
    measured on, takes no part.
    """
    if unknown := [each for each in precisions if each not in ROUNDED]:
        raise UsageError(f"--precision {unknown[0]}: is not among {', '.join(ROUNDED)}")
    path = require_free(calibration_path(model))
    progress("load", 0, 1)
    source = open_source(model)
    progress("load", 1, 1)
    if not isinstance(source, TrainedSource):
        raise UsageError(f"{model}: is a program and reads no text to calibrate on; its weights are not rounded")
    if tokens < source.sequence:
        raise UsageError(f"--tokens is {tokens}; a sequence of {model} has {source.sequence}, give at least as many")
    corpus, length = source.corpus(data, progress), source.sequence
    texts = []
    for context in source.contexts:
        sequences = min(tokens, max(length, len(corpus.train[context].ids))) // length
        texts.append(corpus.batch(context, step=0, sequences=sequences, length=length, seed=0)[:, :-1])
    found = calibrated(source.checkpoint.model, texts, [SCHEMES[each] for each in precisions], progress=progress)
    if not found:
        raise UsageError(f"{model}: has no product with a weight that {' or '.join(precisions)} could round")
    save_calibration(found, model, path)
    return path
