"""Channel ids: which channels of which tensors can only be removed together.

Every channel of every parameter axis starts with an id of its own, and operators couple ids (union-find). Where the
channels of a tensor lie is an array of ids of the tensor's rank, of length 1 along the axes on which the ids are the
same; a tensor can have several such arrays:

    linear's weight (out, in)        ids (out, 1) and (1, in)
    hidden (batch, sequence, ffn)    ids (1, 1, ffn)
    query (batch, heads, seq, dim)   ids (1, heads, 1, dim)

An element of a tensor is removed when one of its ids is. If an array has length 1 on every axis, the whole tensor goes
with one id. An axis without ids stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

ChannelIds = npt.NDArray[np.int64]
"""The ids of a tensor's channels, with length 1 along the axes on which they do not vary."""


@dataclass(frozen=True)
class Value:
    """What is known about one tensor: its shape, its channel ids, and whether it depends on parameters alone.

    A dynamic axis has a large prime as its length; ids may repeat along it with any period.
    """

    shape: tuple[int, ...]
    dynamic: tuple[bool, ...]
    channel_ids: tuple[ChannelIds, ...] = ()
    constant: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    def with_ids(self, channel_ids: Sequence[ChannelIds]) -> Value:
        return replace(self, channel_ids=tuple(channel_ids))


@dataclass
class Coupling:
    """A union-find over channel ids, with notes on why channels stay or belong together."""

    _parent: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _blocked: list[tuple[ChannelIds, str]] = field(default_factory=list)
    _merged: list[tuple[ChannelIds, str]] = field(default_factory=list)
    _attention: list[ChannelIds] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of ids, which are 0 … count - 1."""
        return self._parent.size

    def fresh(self, shape: tuple[int, ...]) -> ChannelIds:
        """New ids, each its own component, in ascending order."""
        first, count = self._parent.size, int(np.prod(shape))
        new = np.arange(first, first + count, dtype=np.int64)
        self._parent = np.concatenate((self._parent, new))
        return new.reshape(shape)

    def find(self, ids: ChannelIds) -> ChannelIds:
        """The component of every id."""
        roots = self._parent[ids]
        while not np.array_equal(higher := self._parent[roots], roots):
            roots = higher
        self._parent[ids] = roots
        return roots

    def couple(self, first: ChannelIds, second: ChannelIds) -> None:
        """Elementwise, with broadcasting: channels with these ids are removed together."""
        a, b = np.broadcast_arrays(self.find(first), self.find(second))
        different = a != b
        for x, y in np.unique(np.stack((a[different], b[different]), axis=-1), axis=0):
            low, high = sorted((self._root(x), self._root(y)))
            self._parent[high] = low

    def _root(self, channel_id: int) -> int:
        while (parent := int(self._parent[channel_id])) != channel_id:
            channel_id = parent
        return channel_id

    def block(self, ids: ChannelIds, why: str) -> None:
        """Channels with these ids are never removed."""
        self._blocked.append((ids, why))

    def note_merge(self, ids: ChannelIds, why: str) -> None:
        """`ids` are one component because of `why`."""
        self._merged.append((ids, why))

    def mark_attention(self, ids: ChannelIds) -> None:
        """A softmax normalises over the channels with these ids: they are attention heads."""
        self._attention.append(ids)

    def blocked(self) -> dict[int, str]:
        """Component -> the first reason why it stays."""
        return self._first(self._blocked)

    def merged(self) -> dict[int, str]:
        """Component -> the first reason why its channels belong together."""
        return self._first(self._merged)

    def attention(self) -> frozenset[int]:
        """Components that are attention heads."""
        return frozenset(int(root) for ids in self._attention for root in np.unique(self.find(ids)))

    def _first(self, notes: list[tuple[ChannelIds, str]]) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for ids, why in notes:
            for root in np.unique(self.find(ids)):
                reasons.setdefault(int(root), why)
        return reasons


def varied(ids: ChannelIds) -> frozenset[int]:
    """The axes along which the ids differ."""
    return frozenset(axis for axis, length in enumerate(ids.shape) if length > 1)


def outermost(ids: ChannelIds) -> int | None:
    """The axis with the largest step between ids: heads, not the channels of a head."""
    steps = {axis: int(np.abs(np.diff(ids, axis=axis)).max()) for axis in varied(ids)}
    return max(steps, key=steps.__getitem__, default=None)
