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

from cpcompile.models.decoder import Decoder, LayerGates
from cpcompile.selection import UnitKind

Importance = dict[UnitKind, npt.NDArray[np.float64]]
"""Per kind an array (contexts, layers, units)."""


def measure_importance(model: Decoder, batches: Iterable[Tensor], context: int | None) -> Importance:
    """Importance of every unit for one context, arrays (layers, units).

    `batches` are token windows (sequences, length + 1). With `context` the gates stand at the
    model's table, else all at 1 (the dense parent).
    """
    config = model.config
    blocks = config.ffn // config.align
    head_sum = torch.zeros(config.layers, config.kv_heads, dtype=torch.float64)
    ffn_sum = torch.zeros(config.layers, blocks, dtype=torch.float64)
    sequences = 0
    for windows in batches:
        count = windows.shape[0]
        gates = []
        for layer in model.blocks:
            if context is None:
                head, ffn = torch.ones(config.kv_heads), torch.ones(blocks)
            else:
                head, ffn = layer.head_gate.table[context].detach(), layer.ffn_gate.table[context].detach()
            gates.append(
                LayerGates(
                    head.repeat(count, 1, 1).requires_grad_(),
                    ffn.repeat(count, 1, 1).requires_grad_(),
                )
            )
        logits = model(windows[:, :-1], gates=gates)
        # Summed over tokens and sequences: each sequence's gates see their own loss alone.
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum") / windows.shape[1]
        leaves = [g for layer_gates in gates for g in (layer_gates.head, layer_gates.ffn)]
        gradients = torch.autograd.grad(loss, leaves)
        head_sum += torch.stack([g[:, 0].double().square().sum(0) for g in gradients[0::2]])
        ffn_sum += torch.stack([g[:, 0].double().square().sum(0) for g in gradients[1::2]])
        sequences += count
    return {
        UnitKind.HEAD: (head_sum / sequences).numpy(),
        UnitKind.FFN: (ffn_sum / sequences).numpy(),
    }


def stack_contexts(per_context: list[Importance]) -> Importance:
    """Arrays (layers, units) of every context -> arrays (contexts, layers, units)."""
    return {kind: np.stack([importance[kind] for importance in per_context]) for kind in per_context[0]}


def moving_average(old: Importance, new: Importance, weight: float) -> Importance:
    """`weight` of the new importance, the rest of the old."""
    return {kind: (1 - weight) * old[kind] + weight * new[kind] for kind in old}
