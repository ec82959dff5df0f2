"""Probabilities of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cpcompile.core.errors import CpcompileError


def require_numbers(logits: npt.NDArray[Any]) -> None:
    """CpcompileError if one of `logits` is NaN, which the largest of them would be mistaken for."""
    if np.isnan(logits).any():
        raise CpcompileError("the logits are not numbers (NaN); run `cpcompile validate` on the bundle")


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
