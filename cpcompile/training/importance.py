"""Importance: how much a context's loss depends on a unit.

    importance[c, l, u] = E over sequences of c of (dL/dg[l, u])^2        at the model's present gates

the diagonal of the Fisher information of the gates (Molchanov et al., arXiv 1906.10771; the
segmentation by gradients of arXiv 2501.12901, section 3.1). Each sequence has gates of its own,
(sequences, units), so one backward pass gives the gradient of every sequence apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile.core.coercion import require
from cpcompile.core.selection import UnitKind, Units
from cpcompile.models.gates import Gate
from cpcompile.models.language_model import LanguageModel
from cpcompile.partitioning.partitioned_module import PartitionedModule

Scores = npt.NDArray[np.float64]
Importance = dict[UnitKind, Scores]
"""Per kind an array (contexts, layers, units)."""
Inputs = tuple[Tensor, ...]
"""The inputs of one forward pass, sequences along the first axis."""
Loss = Callable[[Any, Inputs], Tensor]
"""loss(output of the model, inputs) -> scalar: the sum over sequences of the loss of each."""


def measure_importance(
    model: LanguageModel, batches: Iterable[Tensor], context: int | None, *, leading: int = 0
) -> Importance:
    """Importance of every unit for one context, arrays (layers, units).

    `batches` are token windows (sequences, length + 1), of which the first `leading` ids are no text. With `context`
    the gates stand at the model's table, else all at 1 (the dense parent).
    """
    gates = {units.kind: model.gates(units.kind) for units in model.units()}

    def loss(rows: Sequence[Tensor], inputs: Inputs) -> Tensor:
        windows, remaining = inputs[0], iter(rows)
        logits = model(windows[:, :-1], rows={kind: [next(remaining) for _ in own] for kind, own in gates.items()})
        # Summed over tokens and sequences: each sequence's gates see their own loss alone.
        loss = F.cross_entropy(*scored(logits, windows, leading), reduction="sum")
        return loss / (windows.shape[1] - leading)

    every = [gate for own in gates.values() for gate in own]
    pieces = ((piece,) for windows in batches for piece in model.pieces(windows))
    scores = iter(_mean_square_gradients(every, pieces, loss, context))
    return {kind: np.stack([next(scores) for _ in own]) for kind, own in gates.items()}


def scored(logits: Tensor, windows: Tensor, leading: int) -> tuple[Tensor, Tensor]:
    """Logits (tokens, vocabulary) and labels (tokens,) of all text in the windows but the first token of each.

    logits (sequences, length, vocabulary); windows (sequences, length + 1), whose first `leading` ids are no text.
    """
    return logits[:, leading:].flatten(0, 1), windows[:, leading + 1 :].flatten()


def measure_group_importance(
    module: PartitionedModule, batches: Iterable[Inputs], loss: Loss, context: int | None
) -> Importance:
    """Importance in any partitioned module, arrays (layers, units); 0 where a group has fewer units."""

    def loss_of_rows(rows: Sequence[Tensor], inputs: Inputs) -> Tensor:
        value = loss(module.with_rows(*inputs, rows=rows), inputs)
        require(isinstance(value, Tensor), f"loss returned a {type(value).__name__}: a tensor is needed")
        require(value.numel() == 1, f"loss returned {list(value.shape)} values: one is needed, the sum over samples")
        require(value.requires_grad, "loss returned a tensor without a gradient: do not detach the output")
        return value.reshape(())

    scores = _mean_square_gradients(module.group_gates, batches, loss_of_rows, context)
    finite = all(np.isfinite(score).all() for score in scores)
    require(finite, "the gradients of the loss are NaN or infinite, so no importance follows from them")
    importance = {}
    for units in module.units():
        importance[units.kind] = np.zeros((units.layers, units.count))
        for layer, index in enumerate(module.of_kind(units.kind)):
            importance[units.kind][layer, : module.groups[index].units] = scores[index]
    return importance


def _mean_square_gradients(
    gates: Sequence[Gate],
    batches: Iterable[Inputs],
    loss: Callable[[Sequence[Tensor], Inputs], Tensor],
    context: int | None,
) -> list[Scores]:
    """Mean square over sequences of the gradient of every gate; `loss` takes a table (sequences, units) per gate."""
    sums = [torch.zeros(gate.units, dtype=torch.float64) for gate in gates]
    sequences = 0
    for inputs in batches:
        count = inputs[0].shape[0]
        rows = []
        for gate in gates:
            row = torch.ones_like(gate.table[0]) if context is None else gate.table[context]
            rows.append(row.detach().repeat(count, 1).requires_grad_())
        gradients = torch.autograd.grad(loss(rows, inputs), rows, materialize_grads=True)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.double().square().sum(0).cpu()
        sequences += count
    return [(total / sequences).numpy() for total in sums]


def stack_contexts(per_context: list[Importance]) -> Importance:
    """Arrays (layers, units) of every context -> arrays (contexts, layers, units)."""
    return {kind: np.stack([importance[kind] for importance in per_context]) for kind in per_context[0]}


def moving_average(old: Importance, new: Importance, weight: float) -> Importance:
    """`weight` of the new importance, the rest of the old."""
    return {kind: (1 - weight) * old[kind] + weight * new[kind] for kind in old}


def equal_importance(units: Iterable[Units], contexts: int) -> Importance:
    """The importance of units that need not be measured, because their budgets keep them all."""
    return {own.kind: np.ones((contexts, own.layers, own.count)) for own in units}
