"""Probabilities of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
