"""Factors that make the channels of a product's inputs more alike, where all of them are rounded with one scale.

    x @ W = (x * f) @ (W / f)     f = 1 / largest^s     largest: of the inputs of each channel

Without them, a few large channels take the whole range, and the others lose what they say. The strength s is the one of
STRENGTHS with the least cost of rounding inputs and weights together, if all errors are independent. Costs are in nats,
by the Fisher information:

    inputs:   scale^2 / 12 * sum of E[g^2] / f^2      scale: of the inputs times f      g: the gradients by the inputs

Source: Xiao et al., arXiv 2211.10438, section 4, with the largest weights left out of f.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cpcompile.core.types import Array
from cpcompile.validation.rounded_model import LEVELS

STRENGTHS = np.linspace(0, 1, 21)
"""With 1, all channels become equally large."""
LEAST = 0.01
"""Of the median of the largest inputs: channels that are smaller count as so large, because other text may use them."""


class ReadInputs:
    """What products read, the same for all of them: its largest elements by sequence and channel, and gradients."""

    def __init__(self) -> None:
        self._highest, self._lowest = list[Tensor](), list[Tensor]()
        self._gradients: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Add inputs (…, tokens, channels)."""
        sequences = x.detach().reshape(-1, *x.shape[-2:])
        self._highest.append(sequences.amax(dim=1).clamp(min=0))
        self._lowest.append(sequences.amin(dim=1).clamp(max=0))

    def add_gradient(self, gradient: Tensor) -> None:
        """Add the gradient by inputs that were added."""
        self._gradients = self._gradients + gradient.flatten(0, -2).square().sum(dim=0)

    def factors(self, weight_cost: Callable[[Tensor], float]) -> Array:
        """The factors (channels,) that cost least, together with what they make weights cost."""
        highest, lowest = torch.cat(self._highest), torch.cat(self._lowest)
        largest = _largest(highest, lowest)
        tried = [largest**-strength for strength in STRENGTHS]
        costs = [self._cost(highest, lowest, factors) + weight_cost(factors) for factors in tried]
        chosen: Array = tried[int(np.argmin(costs))].numpy()
        return chosen

    def _cost(self, highest: Tensor, lowest: Tensor, factors: Tensor) -> float:
        """Of rounding the inputs times `factors`, each sequence with one scale."""
        ranges = (highest * factors).amax(dim=1) - (lowest * factors).amin(dim=1)
        return float((ranges / LEVELS).square().mean() / 12 * (self._gradients / factors.square()).sum())


def _largest(highest: Tensor, lowest: Tensor) -> Tensor:
    """The largest of the inputs of every channel, over their geometric mean."""
    largest = torch.maximum(highest.amax(dim=0), -lowest.amin(dim=0))
    if not (there := largest[largest > 0]).numel():
        return torch.ones_like(largest)
    largest = largest.clamp(min=LEAST * float(there.median()))
    return largest / largest.log().mean().exp()
