"""Gradients whose mean squares are the Fisher information: how much a change of values inside of a model matters.

The Fisher information is the second derivative of the divergence KL(model || changed model) in nats.

Source: Martens, arXiv 1412.1193, section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def backward_of_sample(logits: Tensor, generator: torch.Generator) -> None:
    """The backward pass of -log p(y), summed over all tokens; the y are drawn from what `logits` predict."""
    rows = logits.flatten(0, -2)
    drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)[:, 0]
    F.cross_entropy(rows, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]


def on_gradient(value: Tensor, receive: Callable[[Tensor], None]) -> None:
    """Let the backward pass call `receive` with the gradient by `value`."""
    if not value.requires_grad:  # the first one, where the parameters are frozen
        value.requires_grad_()
    value.register_hook(receive)  # type: ignore[no-untyped-call]


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Gradients of what the model computes, without those of its parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
