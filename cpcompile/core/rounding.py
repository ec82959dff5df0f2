"""Weights in few bits: how a parameter is rounded, whichever graph or model holds it.

    int8            8 bits, one scale per output channel; the inputs of a product are rounded to 8 bits as well, with
                    one scale for all of them, when it is computed
    int7            the same with weights in 7 bits, each in a byte: the sum of two products fits in 16 bits then, in
                    which processors without instructions for such sums (VNNI) add them up fastest
    int8-weights    8 bits, one scale per output channel and block of 32 input channels; each such block of an input
    int4-weights    is rounded to 8 bits with a scale of its own; the same with 4 bits

A parameter is rounded whole, before contexts cut it. So what two contexts share stays the same, and the eager model can
be rounded without knowing what its contexts keep. It is rounded to the nearest numbers, unless a calibration has found
others that change the outputs of the model less. Where all inputs of a product share a scale, it may also smooth them:
x @ W = (x * f) @ (W / f), with a factor f for every input channel that makes large channels smaller.

Source: ONNX Runtime, docs/ContribOperators (MatMulNBits); ONNX, DynamicQuantizeLinear and MatMulInteger; smoothing:
Xiao et al., arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpcompile.core.config import ROUNDED

BLOCK = 32
"""Input channels that share a scale: as many as a unit has by default, so that contexts cut between blocks."""
QUANTIZED = "cpcompile.quantized"
"""Metadata of graphs: JSON, the scheme of every parameter that is rounded."""


class Rounded(NamedTuple):
    """What a weight (inputs, outputs) is rounded to, divided by the factors if there are any."""

    numbers: npt.NDArray[np.int8]
    """Signed and whole, (blocks, block, outputs)."""
    scales: npt.NDArray[np.float32]
    """What the numbers are multiplied by, (blocks, 1, outputs)."""
    factors: npt.NDArray[np.float32] | None = None
    """What the inputs of the product are multiplied by before they are rounded, (inputs,)."""


Calibrated = Mapping[str, Rounded]
"""Scheme -> what a parameter is rounded to by it, where better numbers than the nearest are known."""
Calibration = Mapping[str, Calibrated]
"""The same by parameter; others are rounded to the nearest."""
UNCALIBRATED: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Scheme:
    """How a weight (inputs, outputs) is rounded to `bits`; `block` input channels share a scale, None: all do."""

    name: str
    bits: int
    block: int | None
    products_only: bool = False
    """Whether only the weights of products are rounded, as for GPUs: neither their inputs nor tables for lookups."""

    @property
    def smooths(self) -> bool:
        """Whether all inputs of a product are rounded with one scale, so that large channels cost the others."""
        return self.block is None

    def fits(self, inputs: int) -> bool:
        """Whether a weight with so many input channels falls into whole blocks."""
        return self.block is None or inputs % self.block == 0

    def bits_per_weight(self, inputs: int) -> float:
        """The bits that a weight takes with so many input channels, its share of the scales included."""
        return (8 if self.bits > 4 else self.bits) + 32 / (self.block or inputs)

    def round(self, weight: npt.NDArray[Any]) -> Rounded:
        """The nearest whole numbers of `weight`, and their scales.

        A scale takes the element that is farthest from zero to an end of the range: with 4 bits to the lower one, which
        is farther from zero, so that all sixteen numbers are used. With 8 bits that would cost more than it gains,
        because elements at the other end are clipped (SmolLM2: +0.44 % of perplexity instead of +0.16 %).
        """
        inputs, outputs = weight.shape
        blocks = weight.astype(np.float32).reshape(-1, self.block or inputs, outputs)
        half = 2 ** (self.bits - 1)
        if self.bits > 4:
            scale = np.abs(blocks).max(axis=1, keepdims=True) / (half - 1)
        else:
            farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
            scale = farthest / -half
        scale[scale == 0] = 1
        numbers = np.clip(np.round(blocks / scale), -half, half - 1).astype(np.int8)
        return Rounded(numbers, scale.astype(np.float32))

    def factors(self, calibrated: Calibrated) -> npt.NDArray[np.float32] | None:
        """What the inputs of a product with a parameter are multiplied by before they are rounded, (inputs,)."""
        known = calibrated.get(self.name)
        return None if known is None else known.factors

    def rounded(self, weight: npt.NDArray[Any], calibrated: Calibrated, *, looked_up: bool = False) -> Rounded:
        """What `weight` (inputs, outputs) is rounded to: as `calibrated`, or else to the nearest numbers.

        looked_up: where its rows are looked up, so that there are no inputs to smooth.
        """
        known = calibrated.get(self.name)
        return self.round(weight) if known is None or (looked_up and known.factors is not None) else known


def restored(rounded: Rounded, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The numbers times their scales, (inputs, outputs), which belong to inputs times their factors."""
    whole: npt.NDArray[Any] = rounded.numbers.astype(dtype) * rounded.scales.astype(dtype)
    return whole.reshape(-1, rounded.numbers.shape[-1])


_FORMS = ((8, None), (7, None), (8, BLOCK), (4, BLOCK))
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {name: Scheme(name, *form) for name, form in zip(ROUNDED, _FORMS, strict=True)}
)
"""By the names of the precisions that consist of them."""
