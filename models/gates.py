"""Gates: what makes a unit removable.

A gate multiplies the channels of each unit by one number per (context, unit):

    hidden[..., u * width : (u + 1) * width] *= table[context, u]

`table` is the selection times a learned scale, so an entry of 0 is a unit that the context
does not have. In the captured graph the gate is a Gather and a Mul; once the context is a
constant, the zeros in the table are all that the graph passes need to see.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """A table (contexts, units) of gate values, each for `width` neighbouring channels."""

    def __init__(self, contexts: int, units: int, width: int) -> None:
        super().__init__()
        self.units = units
        self.width = width
        self.table = nn.Parameter(torch.ones(contexts, units))

    def row(self, context: Tensor) -> Tensor:
        """Gate values of `context` (int64 scalar), shape (units,)."""
        return nn.functional.embedding(context, self.table)

    def select(self, kept: Tensor) -> None:
        """Bring the table in line with `kept` (contexts, units, bool): 0 where not kept, 1 where newly kept."""
        with torch.no_grad():
            self.table[~kept] = 0.0
            self.table[kept & (self.table == 0)] = 1.0


def apply_gate(hidden: Tensor, gate: Tensor, width: int) -> Tensor:
    """Multiply hidden (..., units * width) by gate (units,), or by one gate per sequence (batch, 1, units)."""
    per_channel = gate.unsqueeze(-1).expand(*gate.shape, width).flatten(-2)
    return hidden * per_channel


def channels_of(units: Tensor, width: int) -> Tensor:
    """Channel indices of the unit indices `units`, shape (len(units) * width,)."""
    return (units.unsqueeze(-1) * width + torch.arange(width)).flatten()
