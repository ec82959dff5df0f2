"""Importance: how much a context's loss depends on a unit.

    importance[c, l, u] = E over sequences of c of (dL/dg[l, u])^2        at the model's present gates

the diagonal of the Fisher information of the gates (Molchanov et al., arXiv 1906.10771; the
segmentation by gradients of arXiv 2501.12901, section 3.1). Each sequence has gates of its own,
so one backward pass gives the gradient of every sequence apart.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile.core.selection import UnitKind
from cpcompile.models.language_model import LanguageModel

Importance = dict[UnitKind, npt.NDArray[np.float64]]
"""Per kind an array (contexts, layers, units)."""


def measure_importance(model: LanguageModel, batches: Iterable[Tensor], context: int | None) -> Importance:
    """Importance of every unit for one context, arrays (layers, units).

    `batches` are token windows (sequences, length + 1). With `context` the gates stand at the
    model's table, else all at 1 (the dense parent).
    """
    kinds = [units.kind for units in model.units()]
    sums = {units.kind: torch.zeros(units.layers, units.count, dtype=torch.float64) for units in model.units()}
    sequences = 0
    for windows in batches:
        count = windows.shape[0]
        rows = {
            kind: [
                (torch.ones(gate.units) if context is None else gate.table[context].detach())
                .repeat(count, 1)
                .requires_grad_()
                for gate in model.gates(kind)
            ]
            for kind in kinds
        }
        logits = model(windows[:, :-1], rows=rows)
        # Summed over tokens and sequences: each sequence's gates see their own loss alone.
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum") / windows.shape[1]
        gradients = iter(torch.autograd.grad(loss, [row for kind in kinds for row in rows[kind]]))
        for kind in kinds:
            sums[kind] += torch.stack([next(gradients).double().square().sum(0) for _ in rows[kind]])
        sequences += count
    return {kind: (total / sequences).numpy() for kind, total in sums.items()}


def stack_contexts(per_context: list[Importance]) -> Importance:
    """Arrays (layers, units) of every context -> arrays (contexts, layers, units)."""
    return {kind: np.stack([importance[kind] for importance in per_context]) for kind in per_context[0]}


def moving_average(old: Importance, new: Importance, weight: float) -> Importance:
    """`weight` of the new importance, the rest of the old."""
    return {kind: (1 - weight) * old[kind] + weight * new[kind] for kind in old}
