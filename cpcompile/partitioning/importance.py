"""Importance of the units of a partitioned module: E over sequences of (dL/dg)^2, as `cpcompile.training.importance`.

Each sequence has gates of its own, (batch, units), so one backward pass gives every sequence's gradient apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpcompile.core.selection import UnitKind
from cpcompile.partitioning.partitioned_module import PartitionedModule

Loss = Callable[[Any, tuple[Tensor, ...]], Tensor]
"""loss(output of the model, inputs) -> scalar: the sum over sequences of the loss of each."""


def measure_group_importance(
    module: PartitionedModule, batches: Iterable[tuple[Tensor, ...]], loss: Loss, context: int | None
) -> dict[UnitKind, npt.NDArray[np.float64]]:
    """Per kind an array (layers, units); 0 where a group has fewer units.

    With `context` the gates stand at the module's table, else all at 1. A batch is the inputs of one forward pass,
    sequences along the first axis.
    """
    sums = [torch.zeros(group.units, dtype=torch.float64) for group in module.groups]
    sequences = 0
    for inputs in batches:
        count = inputs[0].shape[0]
        rows = []
        for gate in module.group_gates:
            row = torch.ones_like(gate.table[0]) if context is None else gate.table[context].detach()
            rows.append(row.repeat(count, 1).requires_grad_())
        gradients = torch.autograd.grad(loss(module.with_rows(*inputs, rows=rows), inputs), rows)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.double().square().sum(0).cpu()
        sequences += count
    importance = {}
    for units in module.units():
        table = np.zeros((units.layers, units.count))
        for layer, index in enumerate(module.of_kind(units.kind)):
            table[layer, : module.groups[index].units] = (sums[index] / sequences).numpy()
        importance[units.kind] = table
    return importance


def next_token_loss(logits: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Cross-entropy of the next token, mean over tokens, summed over sequences; inputs[0] are token ids."""
    ids = inputs[0]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.reshape(ids.shape[0], -1).mean(1).sum()
