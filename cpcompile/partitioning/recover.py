"""Recovery without gradients: the weights of the remaining channels compensate for the removed ones.

    min over W'  E |W t - W' k|^2 + r |W'|^2      =>      W' = W E[t k^T] (E[k k^T] + r I)^-1

where a consumer reads t, all channels, or k, those that the context of the sequence keeps; the mean runs over the
tokens of all contexts at once, so that one weight serves them all. One forward pass does everything: every consumer is
fitted as it is reached, the layers before it already cut and fitted. r = ridge * mean of the diagonal of E[k k^T].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.core.types import Steps, unwatched
from cpcompile.partitioning.gating import GroupGate
from cpcompile.partitioning.partitioned_module import PartitionedModule


def recover_least_squares(
    module: PartitionedModule,
    inputs: tuple[Tensor, ...],
    contexts: Sequence[str],
    selection: Selection,
    *,
    ridge: float = 1e-3,
    progress: Steps = unwatched,
) -> tuple[str, ...]:
    """Re-fit in place the weights of all consumers that lose channels; returns the names of these parameters.

    inputs: those of one forward pass, sequences along the first axis; contexts: the context of every sequence.
    Consumers are linear layers (nn.Linear, or (in, out) weights as in GPT-2); others, such as convolutions and experts,
    and those that are called or share their weight more than once keep their weights. Columns of channels that no
    context keeps stay as they are. Learned scales of gates stay. `progress` is called with the number of fitted
    parameters and of all to fit.
    """
    if not contexts or any(len(contexts) != value.shape[0] for value in inputs):
        raise UsageError("recovery needs sequences, and the context of each")
    with torch.no_grad():
        module.with_rows(*(value[:1] for value in inputs), rows=[gate.table[0] for gate in module.group_gates])
    users = Counter(consumer.parameter for group in module.groups for consumer in group.consumers)
    parameters: dict[str, Tensor] = dict(module.model.named_parameters())
    rows: list[Tensor] = []
    fits: list[tuple[str, nn.Module, _Fit]] = []
    pending: set[str] = set()

    def fitted(left: int) -> None:
        progress(len(fits) - left, len(fits))

    alive = {c: torch.split(torch.from_numpy(module.alive(selection, c)), _units(module)) for c in set(contexts)}
    for index, gate in enumerate(module.group_gates):
        whole = torch.stack([_scale(gate, selection.contexts.index(c), module.contexts) for c in contexts])
        rows.append(whole * torch.stack([alive[c][index] for c in contexts]))
        for number, consumer in enumerate(module.groups[index].consumers):
            weight = parameters[consumer.parameter]
            once = users[consumer.parameter] == 1 and module.calls[module.groups[index].name, consumer.module] == 1
            linear = weight.ndim == 2 and module.groups[index].kind is not UnitKind.EXPERT
            if linear and once and not torch.equal(whole, rows[-1]):
                layer = module.model.get_submodule(consumer.module)
                values = (gate.per_channel(whole, number), gate.per_channel(rows[-1], number))
                pending.add(consumer.parameter)
                fit = _Fit(consumer.parameter, weight, *values, ridge, pending, fitted)
                fits.append((consumer.parameter, layer, fit))
    if not fits:
        return ()
    fitted(len(fits))
    handles = [layer.register_forward_pre_hook(fit, prepend=True) for _, layer, fit in fits]
    try:
        with torch.no_grad(), suppress(_AllFitted):
            module.with_rows(*inputs, rows=rows)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(name for name, _, _ in fits)


class _AllFitted(Exception):  # noqa: N818 - not an error
    """Every consumer has been fitted: the rest of the pass, such as the logits, need not run."""


@dataclass(frozen=True)
class _Fit:
    """The hook that fits one consumer; it sees the input before the gates do."""

    name: str
    weight: Tensor
    whole: Tensor
    """(sequences, channels): scales of all channels."""
    kept: Tensor
    """The same, 0 where the context of the sequence does not keep a channel."""
    ridge: float
    pending: set[str]
    """Parameters of all consumers that are not fitted yet."""
    fitted: Callable[[int], None]
    """Called with their number."""

    def __call__(self, layer: nn.Module, read: tuple[Any, ...]) -> None:
        hidden: Tensor = read[0].flatten(1, -2) if read[0].ndim > 2 else read[0][:, None]
        used = (self.kept != 0).any(0)
        size, channels = int(used.sum()), used.numel()
        moments = torch.zeros(size, size, dtype=torch.float64)
        across = torch.zeros(size, channels, dtype=torch.float64)
        for part, kept, whole in zip(*(torch.split(x, 8) for x in (hidden, self.kept, self.whole)), strict=True):
            read_now = (part * kept[:, None]).flatten(0, 1)[:, used]
            moments += read_now.T @ read_now  # products of a few sequences in single precision, sums in double
            across += read_now.T @ (part * whole[:, None]).flatten(0, 1)
        damping = self.ridge * moments.diagonal().mean().clamp_min(torch.finfo(moments.dtype).tiny)
        moments.diagonal().add_(damping)
        weight = self.weight if isinstance(layer, nn.Linear) else self.weight.T
        weight[:, used] = torch.linalg.solve(moments, across @ weight.double().T).T.to(weight.dtype)
        self.pending.discard(self.name)
        self.fitted(len(self.pending))
        if not self.pending:
            raise _AllFitted


def _scale(gate: GroupGate, context: int, contexts: int) -> Tensor:
    """The learned scales of a context's gates; 1 where the gate is 0."""
    row = gate.table[context if contexts > 1 else 0].detach()
    return torch.where(row == 0, 1.0, row)


def _units(module: PartitionedModule) -> list[int]:
    return [group.units for group in module.groups]
