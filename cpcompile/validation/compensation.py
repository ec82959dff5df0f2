"""Values of parameters whose rounding errors make up for each other in the products that read them (GPTQ).

E[change of an output ^ 2] = d H d     d: what rounding changes in the weights of that output
                                       H = E[x x^T] of the inputs x of the product

A weight is rounded one input channel at a time, those with the largest inputs first. The channels that are still to
come are then changed so that they make up for the error as well as they can.

The result is another value of the parameter: `Scheme.round` takes it to just the numbers that were chosen here. For
that, the scales are those of the original weight, and the elements that they were made from keep their numbers. So
whatever rounds parameters, engines and the eager model alike, can be given the new value instead of the old one.

Source: Frantar et al., arXiv 2210.17323, algorithm 1; the order of the channels is that of the authors' program.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.core.cache import INPUT
from cpcompile.core.rounding import Scheme
from cpcompile.core.types import Array, Steps
from cpcompile.validation.language_reference import LanguageReference
from cpcompile.validation.rounded_model import Rounding

TOKENS, BATCH = 2048, 8
"""Per context, at most; sequences that run at a time."""
DAMPING = 0.01
"""Of the mean of H's diagonal, added to it, so that channels with small inputs do not take all errors."""
TOGETHER = 64
"""Channels whose errors are passed on to all later ones by one product."""


def compensated_parameters(
    reference: LanguageReference, rounded: Mapping[str, Collection[str]], scheme: Scheme, *, steps: Steps
) -> dict[str, Array]:
    """New values of the parameters that engines round by `scheme`, laid out as in the model.

    rounded: context -> the parameters that its engine rounds. H is the sum over the contexts, so that they go on
    sharing what they share, of the exact model, on the half of the held-out text that is searched. All H together are
    about as large as the model. Parameters that are looked up in, as embeddings are, are left out, even if a product
    reads them as well.
    """
    length = reference.sequence
    texts = {context: reference.sample(context, -(-TOKENS // length), length)[INPUT] for context in rounded}
    products: dict[str, _Product] = {}
    looked_up: set[str] = set()
    total = sum(-(-len(text) // BATCH) for text in texts.values()) + len(set().union(*rounded.values()))
    done = 0
    steps(done, total)
    for context, text in texts.items():
        with reference.differentiable(context) as (model, logits_of), torch.no_grad():
            inputs = _Inputs(model, dict.fromkeys(rounded[context], scheme), products, looked_up)
            for start in range(0, len(text), BATCH):
                with inputs:
                    logits_of(torch.from_numpy(text[start : start + BATCH]))
                done += 1
                steps(done, total)
    values = {}
    for name in [each for each in products if each not in looked_up]:
        values[name] = products.pop(name).compensated(scheme)
        done += 1
        steps(done, total)
    steps(total, total)
    return values


def compensated(weight: Array, squares: Tensor, scheme: Scheme) -> Array:
    """A new value of `weight` (inputs, outputs), float32; `squares` (inputs, inputs) is H times any factor."""
    numbers, scales = map(torch.from_numpy, scheme.round(weight))
    left = torch.from_numpy(weight.astype(np.float32))
    far = left.abs().reshape(numbers.shape)
    fixed = (far == far.amax(dim=1, keepdim=True)).reshape(left.shape)
    order = squares.diagonal().argsort(descending=True, stable=True)
    spread = _spread(squares[order][:, order])
    scale = scales.expand(numbers.shape).reshape(left.shape)[order]
    kept, fixed, left = numbers.reshape(left.shape)[order].float(), fixed[order], left[order]
    half = 2 ** (scheme.bits - 1)
    chosen = torch.empty_like(left)
    for start in range(0, len(left), TOGETHER):
        end = min(start + TOGETHER, len(left))
        errors = torch.empty_like(left[start:end])
        for channel in range(start, end):
            nearest = torch.round(left[channel] / scale[channel]).clamp(-half, half - 1)
            chosen[channel] = torch.where(fixed[channel], kept[channel], nearest) * scale[channel]
            error = errors[channel - start] = (left[channel] - chosen[channel]) / spread[channel, channel]
            left[channel:end] -= torch.outer(spread[channel, channel:end], error)
        left[end:] -= spread[start:end, end:].T @ errors
    value = torch.empty_like(chosen)
    value[order] = chosen
    found: Array = value.numpy()
    return found


def _spread(squares: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H: row i says how channels after i make up for an error of i."""
    damped = squares.double()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean() or 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


@dataclass
class _Product:
    """A parameter, and the sum of the squares x x^T of the inputs that it is multiplied by."""

    parameter: Tensor
    outputs_first: bool
    squares: Tensor

    def compensated(self, scheme: Scheme) -> Array:
        weight = self.parameter.detach().numpy()
        value = compensated(weight.T if self.outputs_first else weight, self.squares, scheme)
        return np.ascontiguousarray(value.T if self.outputs_first else value)


class _Inputs(Rounding):
    """While it is active, the model computes exactly, and the squares of inputs are added to `products`.

    looked_up: gets the parameters whose rows are read by number.
    """

    def __init__(
        self, model: nn.Module, schemes: Mapping[str, Scheme], products: dict[str, _Product], looked_up: set[str]
    ) -> None:
        super().__init__(model, schemes)
        self._products = products
        self._looked_up = looked_up

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = self.rounds(func, args)
        if name is not None and func is F.embedding:
            self._looked_up.add(name)
        elif name is not None:
            self._add(name, *args[:2], outputs_first=func is F.linear)
        return func(*args, **dict(kwargs or {}))

    def _add(self, name: str, x: Tensor, parameter: Tensor, *, outputs_first: bool) -> None:
        rows = x.flatten(0, -2)
        squares = rows.T @ rows
        if name in self._products:
            self._products[name].squares += squares
        else:
            self._products[name] = _Product(parameter, outputs_first, squares)
