"""What rounding each parameter costs, from a few backward passes of the eager model.

cost = E[(d log p(y) / d out . change)^2] / 2 tokens      y: drawn from what the model predicts
                                                          change: of the products `out` if that parameter is rounded

This is the divergence KL(model || model with that parameter rounded) in nats per token, to second order: the Fisher
information is the second derivative of the divergence. It is as good for all parameters at once as measuring the
divergence is for a single one. Costs of several parameters add up well enough to rank them.

Source: Martens, arXiv 1412.1193, section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpcompile.core.cache import INPUT
from cpcompile.core.rounding import Scheme
from cpcompile.core.types import Steps
from cpcompile.validation.fisher import backward_of_sample, on_gradient
from cpcompile.validation.language_reference import LanguageReference
from cpcompile.validation.rounded_model import Rounding

SEQUENCES, LENGTH, BATCH = 64, 32, 8
"""Per context: each sequence gives one sample of every cost, so many short ones tell more than a few long ones."""


def rounding_costs(
    reference: LanguageReference, rounded: Mapping[str, Collection[str]], scheme: Scheme, *, steps: Steps
) -> dict[str, float]:
    """The mean cost over the contexts of rounding each parameter by `scheme`, and no other.

    rounded: context -> the parameters that its engine rounds; a parameter costs nothing where it is not among them.
    """
    costs = dict.fromkeys((name for own in rounded.values() for name in own), 0.0)
    texts = {context: reference.sample(context, SEQUENCES, LENGTH)[INPUT] for context in rounded}
    done, total = 0, sum(-(-len(text) // BATCH) for text in texts.values())
    steps(0, total)
    generator = torch.Generator().manual_seed(0)
    for context, text in texts.items():
        with reference.differentiable(context) as (model, logits_of):
            errors = _RoundingErrors(model, dict.fromkeys(rounded[context], scheme), reference.calibration)
            for start in range(0, len(text), BATCH):
                for name, squares in errors.of(logits_of, text[start : start + BATCH], generator).items():
                    costs[name] += squares / (2 * text.size * len(rounded))
                done += 1
                steps(done, total)
    return costs


class _RoundingErrors(Rounding):
    """While it is active, the model computes exactly, and remembers how rounding would change each product."""

    def of(
        self, logits_of: Callable[[Tensor], Tensor], ids: np.ndarray[Any, Any], generator: torch.Generator
    ) -> dict[str, float]:
        """By parameter the sum over the sequences `ids` (batch, length) of the squares in the formula above."""
        self._batch = len(ids)
        self._sums: dict[str, Tensor] = {}
        with torch.enable_grad():
            with self:
                logits = logits_of(torch.from_numpy(ids))
            backward_of_sample(logits, generator)
        return {name: float(sums.square().sum()) for name, sums in self._sums.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        exact = func(*args, **dict(kwargs or {}))
        name = self.rounds(func, args)
        if name is None:
            return exact
        with torch.no_grad():
            change = super().__torch_function__(func, types, args, kwargs) - exact
        on_gradient(exact, lambda gradient: self._add(name, gradient * change))
        return exact

    def _add(self, name: str, products: Tensor) -> None:
        """Sums per sequence; where tokens of all sequences lie in one axis, as in experts, one sum of all."""
        rows = products if len(products) == self._batch else products[None]
        self._sums[name] = self._sums.get(name, torch.zeros(())) + rows.flatten(1).sum(dim=1)
