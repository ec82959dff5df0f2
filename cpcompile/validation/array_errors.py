"""How far an output is from its exact value, over any number of runs, in the usual measures of quantization papers.

max_abs        max |y - e|
max_relative   max |y - e| / max |e|
cosine         of y and e as vectors
sqnr_db        10 log10(sum e^2 / sum (y - e)^2), signal to noise
psnr_db        10 log10(n max e^2 / sum (y - e)^2), peak to noise
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Array

RATIOS = ("max_relative_error", "cosine", "sqnr_db", "psnr_db")
ALL_ZERO = "the output is zero everywhere"
EQUAL = "it is exactly equal: there is no noise"


PIECE = 1 << 18
"""Number of elements compared at a time: the outputs of a language model are large, and float64 doubles them."""


def pieces(*arrays: Array) -> Iterator[tuple[npt.NDArray[np.float64], ...]]:
    """Their elements in float64, PIECE at a time; the arrays have the same shape."""
    flat = [array.ravel() for array in arrays]
    for start in range(0, flat[0].size, PIECE):
        yield tuple(array[start : start + PIECE].astype(np.float64) for array in flat)


@dataclass
class ArrayErrors:
    """Running sums in float64."""

    max_abs: float = 0.0
    largest: float = 0.0
    """Largest absolute exact value."""
    elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    power: float = 0.0

    def add(self, exact: Array, own: Array) -> None:
        """Add one run: arrays of the same shape with finite real numbers."""
        for e, y in pieces(exact, own):
            error = y - e
            self.max_abs = max(self.max_abs, float(np.abs(error).max()))
            self.largest = max(self.largest, float(np.abs(e).max()))
            self.elements += e.size
            self.signal += float(e @ e)
            self.noise += float(error @ error)
            self.product += float(y @ e)
            self.power += float(y @ y)

    def ratios(self) -> dict[str, float | NotMeasured]:
        """RATIOS. Not all exist: an output that is zero everywhere has none, one without noise has no decibels."""
        none = NotMeasured(EQUAL if self.largest else ALL_ZERO)
        peak, norm = self.elements * self.largest**2, math.sqrt(self.signal * self.power)
        return {
            "max_relative_error": self.max_abs / self.largest if self.largest else none,
            "cosine": min(1.0, max(-1.0, self.product / norm)) if norm else none,
            "sqnr_db": 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else none,
            "psnr_db": 10 * math.log10(peak / self.noise) if self.noise and peak else none,
        }
