"""The interface of a language model whose units are gated per context, for trainer, compiler and validator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cpcompile.core.cache import LayerCache
from cpcompile.core.selection import BoolArray, Selection, UnitKind, Units
from cpcompile.models.gates import Gate

Kept = Sequence[Any]
"""What a context keeps, layer by layer, in the form that its model's forward pass takes."""
Rows = Mapping[UnitKind, Sequence[Tensor]]
"""Gate values by kind and layer: (units,), or (batch, units) for gates of each sequence."""
KeysValues = tuple[Tensor, Tensor]
"""Of one layer, each (batch, KV heads, tokens, head_dim)."""
LOGITS = 2**25
"""Logits that a pass over several sequences gives at most (134 MB), or those of one sequence if it has more."""


class Config(Protocol):
    """The shape of a model, whatever its architecture."""

    @property
    def vocabulary(self) -> int: ...


class LanguageModel(nn.Module):
    """Token ids -> logits, with one row of gates per context.

    With `contexts=0` a model has no gates: the dense parent and the dense baseline. With `contexts=1` all contexts
    share their gates: a pruned model.
    """

    config: Config
    contexts: int

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        context: Tensor | None = None,
        *,
        rows: Rows | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """Logits (batch, sequence, vocabulary) of input_ids (batch, sequence, int64).

        `context` (int64 scalar) picks the gates; `rows` gives them directly (importance);
        with `kept` only those units are computed.
        """

    def caches(self) -> Sequence[LayerCache] | None:
        """The cache of every layer; None if the model has no such form of its forward pass."""
        return None

    def decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        past: Sequence[KeysValues],
        context: Tensor | None = None,
    ) -> tuple[Tensor, Sequence[KeysValues]]:
        """The logits of tokens that follow those in the cache `past`, and the cache with both; shapes in `core.cache`.

        logits_to_keep: only those of so many last tokens are computed; 0 for all.
        """
        raise NotImplementedError

    @abstractmethod
    def units(self) -> tuple[Units, ...]:
        """The kinds of units that are trained and frozen."""

    @abstractmethod
    def gates(self, kind: UnitKind) -> Sequence[Gate]:
        """The gates of one kind, one per layer and all of the same size."""

    @abstractmethod
    def kept(self, selection: Selection, context: str) -> Kept | None:
        """What `context` keeps, for the `kept` form of the forward pass; None if the model has no such form."""

    @abstractmethod
    def kept_sizes(self, selection: Selection, context: str) -> dict[str, int]:
        """Elements that `context` keeps of every parameter except the gates, by name."""

    @abstractmethod
    def parameter_kind(self, name: str) -> UnitKind | None:
        """The kind of unit whose removal makes the parameter `name` smaller; None if there is none."""

    def kept_with_tokens(self, selection: Selection, context: str, tokens: int | None) -> dict[str, int]:
        """`kept_sizes` with `tokens` of the vocabulary left; None for all."""
        sizes = self.kept_sizes(selection, context)
        if tokens is None:
            return sizes
        rows = {name for name in sizes if self.parameter_kind(name) is UnitKind.VOCABULARY}
        return {n: size // self.config.vocabulary * tokens if n in rows else size for n, size in sizes.items()}

    @abstractmethod
    def sort_units(self, selection: Selection) -> Selection:
        """Reorder units so that partitions are contiguous; returns the selection in the new order.

        The function computed stays the same. The weights of one partition are then one run of rows.
        """

    def gate_row(self, context: int) -> Tensor | None:
        """The `context` input of `forward` for that context, int64 scalar; None without gates."""
        return torch.tensor(context if self.contexts > 1 else 0) if self.contexts else None

    def gate_tables(self) -> dict[str, nn.Parameter]:
        """The tables of all gates, by parameter name."""
        return {f"{name}.table": module.table for name, module in self.named_modules() if isinstance(module, Gate)}

    def select(self, selection: Selection) -> None:
        """Set every gate to `selection`; gates that stay keep their learned scale."""
        for kind, kept in selection.kept.items():
            for layer, gate in enumerate(self.gates(kind)):
                gate.select(torch.from_numpy(kept[: self.contexts, layer].copy()))

    def pieces(self, windows: Tensor) -> tuple[Tensor, ...]:
        """Split windows (sequences, length) so that the logits of a pass are at most LOGITS."""
        return torch.split(windows, max(1, LOGITS // (windows.shape[1] * self.config.vocabulary)))

    def parameter_sizes(self) -> dict[str, int]:
        """Elements of every parameter except the gates, by name."""
        gates = self.gate_tables()
        return {name: p.numel() for name, p in self.named_parameters() if name not in gates}


def visible(attention_mask: Tensor, sequence: int) -> Tensor:
    """(batch, 1, sequence, past + sequence): each of the last `sequence` tokens looks at itself and those before it.

    At those that `attention_mask` leaves out only they themselves look: a row without any would be no number.
    """
    total = attention_mask.shape[1]
    slots, own = torch.arange(total), torch.arange(sequence)[:, None] + (total - sequence)
    before = (slots < own) & attention_mask[:, None, None, :].bool()
    return before | (slots == own)


def last(count: Tensor) -> slice:
    """The last `count` positions; all for 0, as -0 is the first."""
    number = count.item()
    torch._check(number >= 0)  # type: ignore[no-untyped-call]
    return slice(-number, None)


def partition_order(kept: BoolArray) -> npt.NDArray[np.int64]:
    """Order of the units of one layer, kept (contexts, units): units of more contexts first, then by context."""
    contexts = kept.shape[0]
    code = (kept * (1 << np.arange(contexts - 1, -1, -1, dtype=object))[:, None]).sum(axis=0)
    return np.asarray(sorted(range(kept.shape[1]), key=lambda u: (-int(kept[:, u].sum()), -code[u], u)), dtype=np.int64)
