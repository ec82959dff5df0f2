"""The words of a language model's interface: tokens, and the cache of keys and values of the tokens before them.

    input_ids                      (batch, sequence)                           int64
    attention_mask                 (batch, past + sequence)                    int64, 0 where a prompt is filled up
    position_ids                   (batch, sequence)                           int64
    logits_to_keep                 ()                                          int64, 0 keeps all
    past_key_values.N.key, .value  (batch, KV heads of layer N, past, head_dim)
    logits                         (batch, kept, vocabulary)
    present.N.key, .value          (batch, KV heads of layer N, past + sequence, head_dim)

Source: ONNX Runtime GenAI, docs/genai/reference/config (names and layouts).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cpcompile.core.types import Array, Feeds

INPUT, MASK, POSITIONS, KEEP = "input_ids", "attention_mask", "position_ids", "logits_to_keep"
OUTPUT = "logits"
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
PRESENT = re.compile(r"present\.(\d+)\.(key|value)")
PARTS = ("key", "value")
IN_PLACE = "cpcompile.cache_in_place"
"""Metadata of graphs whose past and present may be one buffer, with room for tokens to come."""
HEADS, LENGTH = 1, 2
"""The axes of a cache tensor that a context may cut, and along which it grows."""


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer: KV heads and channels of each, per token."""

    heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class CacheBytes:
    """What the keys and values of every token of a text take, in a context and in the dense model."""

    bytes_per_token: int
    dense_bytes_per_token: int


def past_name(layer: int | str, part: str) -> str:
    """`past_key_values.0.key`"""
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int | str, part: str) -> str:
    """`present.0.key`"""
    return f"present.{layer}.{part}"


def present_of(past: str) -> str | None:
    """The output that goes on with the input `past`; None if that is no cache."""
    found = PAST.fullmatch(past)
    return present_name(found[1], found[2]) if found else None


def complete(feeds: Feeds, inputs: Mapping[str, Sequence[int | str | None]]) -> dict[str, Array]:
    """`feeds` and what `inputs` (name -> shape) need besides the tokens: all of them, after no others, all logits.

    If a cache is given, the tokens stand behind its own.
    """
    full = dict(feeds)
    missing = [name for name in inputs if name not in feeds and is_optional(name)]
    if INPUT not in feeds or not missing:
        return full
    batch, sequence = feeds[INPUT].shape
    given = [array for name, array in feeds.items() if PAST.fullmatch(name)]
    past = given[0].shape[LENGTH] if given else 0
    for name in missing:
        if name == MASK:
            full[name] = np.ones((batch, past + sequence), dtype=np.int64)
        elif name == POSITIONS:
            full[name] = np.broadcast_to(np.arange(past, past + sequence), (batch, sequence))
        elif name == KEEP:
            full[name] = np.zeros((), dtype=np.int64)
        else:
            heads, head_dim = (int(inputs[name][axis] or 0) for axis in (HEADS, -1))
            full[name] = np.zeros((batch, heads, 0, head_dim), dtype=np.float32)
    return full


def is_optional(name: str) -> bool:
    """Whether `complete` adds the input `name`."""
    return name in (MASK, POSITIONS, KEEP) or PAST.fullmatch(name) is not None
