"""What parameters are rounded to so that errors make up for each other in the products that read them (GPTQ).

cost = sum over the outputs of d H d     d: what rounding changes in the weights of an output
                                         H = E[|g|^2 x x^T], of the inputs x of the product and the
                                             gradients g of log p(y) by its outputs, y drawn from the model

A weight is rounded one input channel at a time, those with the largest inputs first. The channels that are still to
come are then changed so that they make up for the error as well as they can. Before that, the scale of every block is
chosen for which rounding to the nearest would change outputs least if channels were independent: often, its largest
element is better clipped. H comes from text of the contexts; it is summed over them, so that they go on sharing what
they share. Of rows that are looked up, as embeddings are, g takes the place of x: their cost is E[(g d)^2].
In schemes that give all inputs one scale, W / f is rounded, for x * f; see `cpcompile.validation.smoothing`.

Source: Frantar et al., arXiv 2210.17323, algorithm 1; the order of the channels is that of the authors' program. The
weights |g|^2 are those of the Fisher information, as in Kim et al., arXiv 2505.07004, with all outputs in one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from cpcompile.validation.smoothing import ReadInputs

READING, ROUNDING = "read the text", "round"
"""Stages of the progress."""
BATCH = 4
"""Sequences that run at a time."""
DAMPING = 0.01
"""Of the mean of H's diagonal, added to it, so that channels with small inputs do not take all errors."""
TOGETHER = 64
"""Channels whose errors are passed on to all later ones by one product."""
SCALES = np.linspace(0.7, 1.1, 17, dtype=np.float32)
"""Times the scale that takes the largest element to the end of the range: the scales that are tried."""
LEFT = 1 / 3
"""Of the cost of rounding weights, what is left when errors make up for each other (0.22 / 0.58 % for SmolLM2)."""


def calibrated(
    model: LanguageModel, texts: Sequence[npt.NDArray[np.int64]], schemes: Sequence[Scheme], *, progress: Progress
) -> dict[str, dict[str, Rounded]]:
    """What the parameters of products are rounded to by each scheme, from the text (sequences, length) of each context.

    All H together are about as large as the model, and what is found for each scheme is a quarter of it.
    """
    own = model.parameter_sizes()
    names = [name for name, each in model.named_parameters() if name in own and each.ndim == 2]
    inputs, generator = _Inputs(model, dict.fromkeys(names, schemes[0])), torch.Generator().manual_seed(0)
    done, total = 0, sum(-(-len(text) // BATCH) for text in texts)
    progress(READING, done, total)
    with frozen_parameters(model), torch.enable_grad():
        for context, text in enumerate(texts):
            for start in range(0, len(text), BATCH):
                batch = torch.from_numpy(text[start : start + BATCH])
                backward_of_sample(inputs.logits_of(model, batch, context), generator)
                done += 1
                progress(READING, done, total)
    progress(ROUNDING, 0, len(names))
    factors = {scheme.name: _factors(inputs.products, scheme) for scheme in schemes if scheme.smooths}
    found = dict[str, dict[str, Rounded]]()
    for done, name in enumerate(names, start=1):
        if (product := inputs.products.pop(name, None)) is not None:
            fitting = [scheme for scheme in schemes if scheme.fits(len(product.weight))]
            rounded = {each.name: product.rounded(each, factors.get(each.name, {}).get(name)) for each in fitting}
            found |= {name: rounded} if rounded else {}
        progress(ROUNDING, done, len(names))
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
    return Rounded(back.numpy().reshape(len(scales), -1, weight.shape[1]), scales)


def _scales(weight: Array, sizes: Array, scheme: Scheme) -> Array:
    """The scale of every block of `weight`, by the mean squares `sizes` (inputs,) of the inputs."""
    numbers, largest, _ = scheme.round(weight)
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


def _factors(products: Mapping[str, _Product], scheme: Scheme) -> dict[str, Array]:
    """By parameter the factors of its inputs; products that read the same have the same, and round it once."""
    readers: dict[ReadInputs, list[str]] = {}
    for name, product in products.items():
        if product.read is not None:
            readers.setdefault(product.read, []).append(name)
    found = dict[str, Array]()
    for read, names in readers.items():
        weights = [products[name] for name in names]
        factors = read.factors(partial(_cost, weights, scheme))
        if (factors != 1).any():
            found |= dict.fromkeys(names, factors)
    return found


def _cost(weights: Sequence[_Product], scheme: Scheme, factors: Tensor) -> float:
    """Of rounding the weights over `factors`, in nats."""
    return sum(each.cost(scheme, factors) for each in weights)


@dataclass
class _Product:
    """A weight (inputs, outputs), and the weighted sums of the squares x x^T of the inputs that it is multiplied by."""

    weight: Array
    squares: Tensor
    looked_up: Tensor | float = 0.0
    """The same for its rows, if they are looked up."""
    read: ReadInputs | None = None
    """The inputs; None if its rows are only looked up."""

    def add_inputs(self, rows: Tensor, gradients: Tensor) -> None:
        """Add inputs (tokens, inputs), and the gradients by the outputs (tokens, outputs)."""
        weighted = rows * torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        self.squares += weighted.T @ weighted

    def add_rows(self, gradients: Tensor) -> None:
        """Add gradients (tokens, inputs) by rows that were looked up."""
        self.looked_up = self.looked_up + gradients.T @ gradients

    def cost(self, scheme: Scheme, factors: Tensor) -> float:
        """Of rounding the weight over `factors`."""
        scales = (torch.from_numpy(self.weight).abs() / factors[:, None]).amax(dim=0) / (2 ** (scheme.bits - 1) - 1)
        return float(LEFT * scales.square().mean() / 12 * (self.squares.diagonal() * factors.square()).sum())

    def rounded(self, scheme: Scheme, factors: Array | None) -> Rounded:
        """What it is rounded to; with `factors`, lookups do not count, because they read other numbers."""
        if factors is None:
            return compensated(self.weight, self.squares + self.looked_up, scheme)
        each = torch.from_numpy(factors)
        found = compensated(self.weight / factors[:, None], self.squares * torch.outer(each, each), scheme)
        return found._replace(factors=factors)


class _Inputs(Rounding):
    """While it is active, the model computes exactly, and its backward pass adds to `products`."""

    def __init__(self, model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(model, schemes)
        self.products: dict[str, _Product] = {}
        self._reads: dict[str, ReadInputs] = {}
        self._first: dict[Tensor, str] = {}
        """By the inputs of a batch the first product that read them."""

    def logits_of(self, model: LanguageModel, ids: Tensor, context: int) -> Tensor:
        with self:
            logits: Tensor = model(ids, model.gate_row(context))
        self._first = {}
        return logits

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **dict(kwargs or {}))
        if (name := self.rounds(func, args)) is None:
            return out
        x, parameter = args[:2]
        product = self._product(name, parameter, inputs_first=func is torch.matmul)
        if func is F.embedding:
            on_gradient(out, lambda gradient: product.add_rows(gradient.flatten(0, -2)))
        else:
            read = self._read(name, x)
            product.read = product.read or read  # a weight of several products has the factors of the first
            rows = x.detach().flatten(0, -2)
            on_gradient(out, lambda gradient: product.add_inputs(rows, gradient.flatten(0, -2)))
        return out

    def _product(self, name: str, parameter: Tensor, *, inputs_first: bool) -> _Product:
        if name not in self.products:
            whole = parameter.detach().numpy()
            weight = whole if inputs_first else whole.T
            self.products[name] = _Product(weight, torch.zeros(len(weight), len(weight)))
        return self.products[name]

    def _read(self, name: str, x: Tensor) -> ReadInputs:
        """What the products know of their inputs `x`: the first one that reads them adds to it."""
        if x not in self._first:
            self._first[x] = name
            read = self._reads.setdefault(name, ReadInputs())
            read.add(x)
            on_gradient(x, read.add_gradient)
        return self._reads[self._first[x]]
