"""A decoder-only language model whose FFN blocks and attention heads are gated per context.

    tokens -> embedding -> [ RMSNorm -> attention * gate -> +  RMSNorm -> SwiGLU * gate -> + ] x layers
           -> RMSNorm -> head

The forward pass exists in two forms that compute the same function:

* masked: every unit is computed and multiplied by its gate (captured, and the reference of parity);
* kept: only the units in `Kept` are computed, from slices of the weights (training).

Sources: RMSNorm arXiv 1910.07467, rotary positions arXiv 2104.09864, grouped-query attention
arXiv 2305.13245, SwiGLU arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.core.cache import LayerCache
from cpcompile.core.config import ModelConfig
from cpcompile.core.selection import Selection, UnitKind, Units
from cpcompile.models.gates import Gate, apply_gate, channels_of
from cpcompile.models.language_model import KeysValues, LanguageModel, Rows, last, partition_order, visible


@dataclass(frozen=True)
class LayerKept:
    """Indices of what one context keeps in one layer."""

    head_units: Tensor
    query_channels: Tensor
    key_channels: Tensor
    ffn_units: Tensor
    ffn_channels: Tensor


@dataclass(frozen=True)
class Window:
    """Where the tokens of a pass stand: the rotation of their positions, and what they may look at."""

    cos: Tensor
    sin: Tensor
    """(sequence, head_dim), or (batch, 1, sequence, head_dim) for positions of each sequence."""
    mask: Tensor | None = None
    """(batch, 1, sequence, past + sequence), true where a token looks; None for all tokens up to its own."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for x (batch, heads, sequence, head_dim); cos, sin as in `Window`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention; its units are the key/value heads with their query heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_key = config.heads // config.kv_heads
        self.query = nn.Linear(config.width, config.heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(config.heads * self.head_dim, config.width, bias=False)

    @property
    def unit_width(self) -> int:
        """Channels of the merged heads that one unit owns."""
        return self.queries_per_key * self.head_dim

    def forward(
        self, x: Tensor, window: Window, gate: Tensor | None, kept: LayerKept | None, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """The merged heads, projected, and keys and values of all tokens up to here."""
        query, key, value, output = (m.weight for m in (self.query, self.key, self.value, self.output))
        if kept is not None:
            query, output = query[kept.query_channels], output[:, kept.query_channels]
            key, value = key[kept.key_channels], value[kept.key_channels]
        batch, sequence, _ = x.shape
        q = rotate(self._split(F.linear(x, query)), window.cos, window.sin)
        k = rotate(self._split(F.linear(x, key)), window.cos, window.sin)
        v = self._split(F.linear(x, value))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        mixed = F.scaled_dot_product_attention(
            q, k, v, window.mask, is_causal=window.mask is None, enable_gqa=self.queries_per_key > 1
        )
        merged = mixed.transpose(1, 2).reshape(batch, sequence, query.shape[0])
        if gate is not None:
            merged = apply_gate(merged, gate, self.unit_width)
        return F.linear(merged, output), (k, v)

    def _split(self, x: Tensor) -> Tensor:
        """(batch, sequence, heads * head_dim) -> (batch, heads, sequence, head_dim)."""
        return x.reshape(x.shape[0], x.shape[1], x.shape[2] // self.head_dim, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU; its units are blocks of `align` hidden channels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.unit_width = config.align
        self.gate = nn.Linear(config.width, config.ffn, bias=False)
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor, gate: Tensor | None, kept: LayerKept | None) -> Tensor:
        gating, up, down = self.gate.weight, self.up.weight, self.down.weight
        if kept is not None:
            gating, up, down = gating[kept.ffn_channels], up[kept.ffn_channels], down[:, kept.ffn_channels]
        hidden = F.silu(F.linear(x, gating)) * F.linear(x, up)
        if gate is not None:
            hidden = apply_gate(hidden, gate, self.unit_width)
        return F.linear(hidden, down)


class Layer(nn.Module):
    """Attention and feed-forward network, each with its norm, its gate and a residual connection."""

    def __init__(self, config: ModelConfig, contexts: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = FeedForward(config)
        if contexts:
            self.head_gate = Gate(contexts, config.kv_heads, self.attention.unit_width)
            self.ffn_gate = Gate(contexts, config.ffn // config.align, config.align)

    def forward(
        self,
        x: Tensor,
        window: Window,
        head: Tensor | None,
        ffn: Tensor | None,
        kept: LayerKept | None,
        past: KeysValues | None,
    ) -> tuple[Tensor, KeysValues]:
        """`head` and `ffn` are the gates of the units that are computed: (units,) or (batch, 1, units)."""
        mixed, present = self.attention(self.attention_norm(x), window, head, kept, past)
        x = x + mixed
        fed: Tensor = self.ffn(self.ffn_norm(x), ffn, kept)
        return x + fed, present


class Decoder(LanguageModel):
    """The decoder that `cpcompile train` trains from scratch."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, *, contexts: int = 0) -> None:
        super().__init__()
        self.config = config
        self.contexts = contexts
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config, contexts) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        self.register_buffer("frequencies", (config.rope_base**-exponents).float(), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of deviation 0.02; projections into the residual stream scaled down with depth."""
        residual = 0.02 / (2 * self.config.layers) ** 0.5
        gates = self.gate_tables()
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and name not in gates:
                into_residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=residual if into_residual else 0.02)

    frequencies: Tensor
    """Angle per position of every pair of channels."""

    def forward(
        self,
        input_ids: Tensor,
        context: Tensor | None = None,
        *,
        rows: Rows | None = None,
        kept: Sequence[LayerKept] | None = None,
    ) -> Tensor:
        window = self._window(torch.arange(input_ids.shape[1]))
        hidden, _ = self._hidden(input_ids, window, (None,) * len(self.blocks), context, rows, kept)
        return self._logits(hidden)

    def decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        past: Sequence[KeysValues],
        context: Tensor | None = None,
    ) -> tuple[Tensor, Sequence[KeysValues]]:
        window = self._window(position_ids[:, None], visible(attention_mask, input_ids.shape[1]))
        hidden, present = self._hidden(input_ids, window, past, context)
        return self._logits(hidden[:, last(logits_to_keep)]), present

    def caches(self) -> Sequence[LayerCache]:
        return [LayerCache(self.config.kv_heads, self.config.head_dim)] * self.config.layers

    def _hidden(
        self,
        input_ids: Tensor,
        window: Window,
        past: Sequence[KeysValues | None],
        context: Tensor | None,
        rows: Rows | None = None,
        kept: Sequence[LayerKept] | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """What the last layer makes (batch, sequence, width), and the keys and values of every layer."""
        x, present = self.embedding(input_ids), []
        for index, layer in enumerate(self.blocks):
            layer_kept = kept[index] if kept is not None else None
            head = ffn = None
            if rows is not None:
                head, ffn = (_per_token(rows[kind][index]) for kind in (UnitKind.HEAD, UnitKind.FFN))
            elif context is not None:
                head, ffn = layer.head_gate.row(context), layer.ffn_gate.row(context)
                if layer_kept is not None:
                    head, ffn = head[layer_kept.head_units], ffn[layer_kept.ffn_units]
            x, keys_values = layer(x, window, head, ffn, layer_kept, past[index])
            present.append(keys_values)
        return x, present

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.embedding.weight if self.config.tied else self.head.weight
        return F.linear(self.norm(hidden), head)

    def _window(self, positions: Tensor, mask: Tensor | None = None) -> Window:
        angles = positions[..., None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        dtype = self.embedding.weight.dtype
        return Window(angles.cos().to(dtype), angles.sin().to(dtype), mask)

    @property
    def blocks(self) -> Sequence[Layer]:
        """The layers, typed."""
        return cast(Sequence[Layer], self.layers)

    def units(self) -> tuple[Units, ...]:
        config = self.config
        group = config.heads // config.kv_heads * config.head_dim
        return (
            Units(kind=UnitKind.FFN, layers=config.layers, count=config.ffn // config.align, width=config.align),
            Units(kind=UnitKind.HEAD, layers=config.layers, count=config.kv_heads, width=group),
        )

    def gates(self, kind: UnitKind) -> Sequence[Gate]:
        return [layer.head_gate if kind is UnitKind.HEAD else layer.ffn_gate for layer in self.blocks]

    def kept(self, selection: Selection, context: str) -> Sequence[LayerKept]:
        """The indices that `context` keeps, layer by layer."""
        row = selection.row(context)
        result = []
        for index, layer in enumerate(self.blocks):
            head_units = torch.from_numpy(row[UnitKind.HEAD][index]).nonzero().flatten()
            ffn_units = torch.from_numpy(row[UnitKind.FFN][index]).nonzero().flatten()
            result.append(
                LayerKept(
                    head_units=head_units,
                    query_channels=channels_of(head_units, layer.attention.unit_width),
                    key_channels=channels_of(head_units, layer.attention.head_dim),
                    ffn_units=ffn_units,
                    ffn_channels=channels_of(ffn_units, layer.ffn.unit_width),
                )
            )
        return result

    def kept_sizes(self, selection: Selection, context: str) -> dict[str, int]:
        kept = self.kept(selection, context)
        sizes = self.parameter_sizes()
        for index, layer in enumerate(kept):
            per_channel = self.config.width
            cut = {
                "attention.query": layer.query_channels,
                "attention.key": layer.key_channels,
                "attention.value": layer.key_channels,
                "attention.output": layer.query_channels,
                "ffn.gate": layer.ffn_channels,
                "ffn.up": layer.ffn_channels,
                "ffn.down": layer.ffn_channels,
            }
            for module, channels in cut.items():
                sizes[f"layers.{index}.{module}.weight"] = channels.numel() * per_channel
            if layer.query_channels.numel() == 0:
                sizes[f"layers.{index}.attention_norm.weight"] = 0
            if layer.ffn_channels.numel() == 0:
                sizes[f"layers.{index}.ffn_norm.weight"] = 0
        return sizes

    def sort_units(self, selection: Selection) -> Selection:
        kept = {kind: table.copy() for kind, table in selection.kept.items()}
        for index, layer in enumerate(self.blocks):
            heads = partition_order(kept[UnitKind.HEAD][:, index])
            blocks = partition_order(kept[UnitKind.FFN][:, index])
            kept[UnitKind.HEAD][:, index] = kept[UnitKind.HEAD][:, index, heads]
            kept[UnitKind.FFN][:, index] = kept[UnitKind.FFN][:, index, blocks]
            attention, ffn = layer.attention, layer.ffn
            queries = channels_of(torch.from_numpy(heads), attention.unit_width)
            keys = channels_of(torch.from_numpy(heads), attention.head_dim)
            channels = channels_of(torch.from_numpy(blocks), ffn.unit_width)
            with torch.no_grad():
                for module, rows in (
                    (attention.query, queries),
                    (attention.key, keys),
                    (attention.value, keys),
                    (ffn.gate, channels),
                    (ffn.up, channels),
                ):
                    module.weight.copy_(module.weight[rows])
                attention.output.weight.copy_(attention.output.weight[:, queries])
                ffn.down.weight.copy_(ffn.down.weight[:, channels])
                layer.head_gate.table.copy_(layer.head_gate.table[:, heads])
                layer.ffn_gate.table.copy_(layer.ffn_gate.table[:, blocks])
        return Selection(selection.contexts, kept)

    def parameter_kind(self, name: str) -> UnitKind | None:
        if ".ffn." in name:
            return UnitKind.FFN
        if ".attention." in name:
            return UnitKind.HEAD
        if name.startswith(("embedding.", "head.")):
            return UnitKind.VOCABULARY
        return None


def _per_token(row: Tensor) -> Tensor:
    """(batch, units) -> (batch, 1, units); (units,) stays unchanged."""
    return row.unsqueeze(1) if row.ndim == 2 else row
