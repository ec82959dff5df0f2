"""Recovery without gradients: what a consumer reads of the channels that are left makes up for those that are gone.

    min over W'  E |W h - W' h_kept|^2 + ridge |W'|^2      =>      W' = W G[:, kept] (G[kept, kept] + r I)^-1

with G = E[h h^T], the second moments of the consumer's input on the context's text, all channels; layer by layer, the
layers before already cut and fitted, r = ridge * mean of the diagonal of G[kept, kept].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from cpcompile.errors import UsageError
from cpcompile.partitioning.partitioned_module import PartitionedModule
from cpcompile.selection import Selection


class _Seen(Exception):  # noqa: N818 - no error
    """The consumer has been reached: the rest of the model need not run."""


def recover_least_squares(
    module: PartitionedModule,
    batches: Iterable[tuple[Tensor, ...]],
    context: str,
    selection: Selection,
    *,
    ridge: float = 1e-3,
) -> dict[str, Tensor]:
    """New weights of all consumers that lose channels, by parameter name, for `context`; the module stays as it was.

    batches: inputs of forward passes over text of the context. Consumers are linear layers (nn.Linear, or (in, out)
    weights as of GPT-2); others, such as convolutions, and weights shared between consumers keep their weights.
    The weights have their full shape; columns of channels that are gone are 0. Learned scales of gates stay.
    """
    inputs = list(batches)
    if not inputs:
        raise UsageError(f"{context}: recovery needs at least one batch of its text")
    alive = torch.from_numpy(module.alive(selection, context))
    at = selection.contexts.index(context) if module.contexts > 1 else 0
    scales = [torch.where(gate.table[at] == 0, 1.0, gate.table[at]).detach() for gate in module.group_gates]
    parts = torch.split(alive, [group.units for group in module.groups])
    rows = [scale * part for scale, part in zip(scales, parts, strict=True)]
    current = list(scales)
    parameters: dict[str, Tensor] = dict(module.model.named_parameters())
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        try:
            for index, group in enumerate(module.groups):
                for consumer in group.consumers:
                    weight = parameters[consumer.parameter]
                    channels = torch.from_numpy(consumer.unit_of_channel)
                    kept = (channels < 0) | parts[index][channels.clamp(min=0)]
                    shared = sum(c.parameter == consumer.parameter for g in module.groups for c in g.consumers) > 1
                    if kept.all() or not kept.any() or weight.ndim != 2 or shared:
                        continue
                    layer = module.model.get_submodule(consumer.module)
                    moments = _second_moments(module, layer, inputs, current, kept.numel())
                    before[consumer.parameter] = weight.clone()
                    turned = not isinstance(layer, nn.Linear)
                    fitted = _fit((weight.T if turned else weight).double(), moments, kept, ridge)
                    weight.copy_((fitted.T if turned else fitted).to(weight.dtype))
                current[index] = rows[index]
            return {name: parameters[name].clone() for name in before}
        finally:
            for name, weight in before.items():
                parameters[name].copy_(weight)


def _second_moments(
    module: PartitionedModule,
    layer: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    rows: Sequence[Tensor],
    channels: int,
) -> Tensor:
    """Mean of h h^T over all tokens that `layer` reads, (channels, channels) in double precision."""
    total, tokens = torch.zeros(channels, channels, dtype=torch.float64), 0

    def collect(_layer: nn.Module, read: tuple[Tensor, ...]) -> None:
        nonlocal total, tokens
        hidden = read[0].reshape(-1, channels).double()
        total += hidden.T @ hidden
        tokens += hidden.shape[0]
        raise _Seen

    handle = layer.register_forward_pre_hook(collect)
    try:
        for batch in batches:
            with suppress(_Seen):
                module.with_rows(*batch, rows=rows)
    finally:
        handle.remove()
    return total / tokens


def _fit(weight: Tensor, moments: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The weight (out, in) that reads the kept channels alone."""
    own = moments[kept][:, kept]
    damping = ridge * own.diagonal().mean() * torch.eye(own.shape[0], dtype=own.dtype)
    solved = torch.linalg.solve(own + damping, moments[kept] @ weight.T)
    fitted = torch.zeros_like(weight)
    fitted[:, kept] = solved.T
    return fitted
