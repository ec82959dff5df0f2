"""What parameters are rounded to so that the errors make up for each other in the products that read them (GPTQ).

cost = sum over the outputs of d H d     d: what rounding changes in the weights of an output
                                         H = E[|g|^2 x x^T], of the inputs x of the product and the
                                             gradients g of log p(y) by its outputs, y drawn from the model

A weight is rounded one input channel at a time, those with the largest inputs first. The channels that are still to
come are then changed so that they make up for the error as well as they can. Before that, the scale of every block is
chosen for which rounding to the nearest would change outputs least if channels were independent: often, its largest
element is better clipped. H comes from text of the contexts; it is summed over them, so that they go on sharing what
they share. Of rows that are looked up, as embeddings are, g takes the place of x: their cost is E[(g d)^2].

Source: Frantar et al., arXiv 2210.17323, algorithm 1; the order of the channels is that of the authors' program. The
weights |g|^2 are those of the Fisher information, as in Kim et al., arXiv 2505.07004, with all outputs in one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.core.rounding import Rounded, Scheme
from cpcompile.core.types import Array, Progress
from cpcompile.models.language_model import LanguageModel
from cpcompile.validation.fisher import backward_of_sample, frozen_parameters, on_gradient
from cpcompile.validation.rounded_model import Rounding

READING, ROUNDING = "read the text", "round"
"""Stages of the progress."""
BATCH = 8
"""Sequences that run at a time."""
DAMPING = 0.01
"""Of the mean of H's diagonal, added to it, so that channels with small inputs do not take all errors."""
TOGETHER = 64
"""Channels whose errors are passed on to all later ones by one product."""
SCALES = np.linspace(0.7, 1.1, 17, dtype=np.float32)
"""Times the scale that takes the largest element to the end of the range: the scales that are tried."""


def calibrated(
    model: LanguageModel, texts: Sequence[npt.NDArray[np.int64]], scheme: Scheme, *, progress: Progress
) -> dict[str, Rounded]:
    """What the parameters of products are rounded to by `scheme`, from the text (sequences, length) of each context.

    All H together are about as large as the model.
    """
    own = model.parameter_sizes()
    names = [name for name, each in model.named_parameters() if name in own and each.ndim == 2]
    inputs, generator = _Inputs(model, dict.fromkeys(names, scheme)), torch.Generator().manual_seed(0)
    done, total = 0, sum(-(-len(text) // BATCH) for text in texts)
    progress(READING, done, total)
    with frozen_parameters(model), torch.enable_grad():
        for context, text in enumerate(texts):
            for start in range(0, len(text), BATCH):
                with inputs:
                    logits = model(torch.from_numpy(text[start : start + BATCH]), model.gate_row(context))
                backward_of_sample(logits, generator)
                done += 1
                progress(READING, done, total)
    found = {}
    for done, name in enumerate(names):
        progress(ROUNDING, done, len(names))
        product = inputs.products.pop(name, None)
        if product is not None and scheme.fits(len(product.squares)):
            found[name] = compensated(product.weight, product.squares, scheme)
    progress(ROUNDING, len(names), len(names))
    return found


def compensated(weight: Array, squares: Tensor, scheme: Scheme) -> Rounded:
    """What `weight` (inputs, outputs) is rounded to; `squares` (inputs, inputs) is H times any factor."""
    scales = _scales(weight, squares.diagonal().numpy(), scheme)
    left = torch.from_numpy(weight.astype(np.float32))
    order = squares.diagonal().argsort(descending=True, stable=True)
    spread = _spread(squares[order][:, order])
    scale = torch.from_numpy(scales).expand(-1, len(left) // len(scales), -1).reshape(left.shape)[order]
    left = left[order]
    half = 2 ** (scheme.bits - 1)
    numbers = torch.empty_like(left)
    for start in range(0, len(left), TOGETHER):
        end = min(start + TOGETHER, len(left))
        errors = torch.empty_like(left[start:end])
        for channel in range(start, end):
            numbers[channel] = torch.round(left[channel] / scale[channel]).clamp(-half, half - 1)
            error = (left[channel] - numbers[channel] * scale[channel]) / spread[channel, channel]
            left[channel:end] -= torch.outer(spread[channel, channel:end], error)
            errors[channel - start] = error
        left[end:] -= spread[start:end, end:].T @ errors
    back = numbers[order.argsort()].to(torch.int8)
    return back.numpy().reshape(len(scales), -1, weight.shape[1]), scales


def _scales(weight: Array, sizes: Array, scheme: Scheme) -> Array:
    """The scale of every block of `weight`, by the mean squares `sizes` (inputs,) of the inputs."""
    numbers, largest = scheme.round(weight)
    blocks, half = weight.reshape(numbers.shape), 2 ** (scheme.bits - 1)
    sizes = sizes.reshape(*numbers.shape[:2], 1)
    best, least = largest, np.full(largest.shape, np.inf)
    for scale in (part * largest for part in SCALES):
        error = np.clip(np.round(blocks / scale), -half, half - 1) * scale - blocks
        cost = (error * error * sizes).sum(axis=1, keepdims=True)
        best, least = np.where(cost < least, scale, best), np.minimum(cost, least)
    return best


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
    """A weight (inputs, outputs), and the weighted sum of the squares x x^T of the inputs that it is multiplied by."""

    weight: Array
    squares: Tensor


class _Inputs(Rounding):
    """While it is active, the model computes exactly, and its backward pass adds to `products`."""

    def __init__(self, model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(model, schemes)
        self.products: dict[str, _Product] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **dict(kwargs or {}))
        if (name := self.rounds(func, args)) is None:
            return out
        x, parameter = args[:2]
        whole = parameter.detach().numpy()
        weight = whole if func is torch.matmul else whole.T
        if func is F.embedding:
            on_gradient(out, lambda gradient: self._add(name, weight, gradient.flatten(0, -2)))
        else:
            rows = x.detach().flatten(0, -2)
            on_gradient(out, lambda gradient: self._add(name, weight, rows * _norms(gradient.flatten(0, -2))))
        return out

    def _add(self, name: str, weight: Array, rows: Tensor) -> None:
        squares = rows.T @ rows
        if name in self.products:
            self.products[name].squares += squares
        else:
            self.products[name] = _Product(weight, squares)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms
