"""Gradients whose mean squares are the Fisher information: how much a change of values inside of a model matters.

The Fisher information is the second derivative of the divergence KL(model || changed model) in nats.

Source: Martens, arXiv 1412.1193, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def backward_of_sample(logits: Tensor, generator: torch.Generator) -> None:
    """The backward pass of -log p(y), summed over all tokens; the y are drawn from what `logits` predict."""
    rows = logits.flatten(0, -2)
    drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)[:, 0]
    F.cross_entropy(rows, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]


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
