"""Labels: which channels of which tensors can only be removed together.

Every channel of every parameter axis starts with a label of its own. Operators tie labels (union-find). A *facet* is an
array of labels of the rank of its tensor, of length 1 along the axes that its labels do not vary on:

    linear's weight (out, in)        facets (out, 1) and (1, in)
    hidden (batch, sequence, ffn)    facet  (1, 1, ffn)
    query (batch, heads, seq, dim)   facet  (1, heads, 1, dim)

An element of a tensor is removed when one of its labels is. A facet of length 1 everywhere is *whole*: the tensor
goes with one label. An axis without a facet stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Facet = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Value:
    """What is known of one tensor: its shape, its facets, and whether it depends on parameters alone.

    A dynamic axis has a large prime as its length; a facet may repeat along it with any period.
    """

    shape: tuple[int, ...]
    dynamic: tuple[bool, ...]
    facets: tuple[Facet, ...] = ()
    constant: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    def with_facets(self, facets: Sequence[Facet]) -> Value:
        return replace(self, facets=tuple(facets))


@dataclass
class Labels:
    """A union-find over labels, with what is to be said about them."""

    _parent: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _blocked: list[tuple[Facet, str]] = field(default_factory=list)
    _merged: list[tuple[Facet, str]] = field(default_factory=list)
    _attention: list[Facet] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Labels are 0 … count - 1."""
        return self._parent.size

    def fresh(self, shape: tuple[int, ...]) -> Facet:
        """New labels, each its own component, in ascending order."""
        first, count = self._parent.size, int(np.prod(shape))
        new = np.arange(first, first + count, dtype=np.int64)
        self._parent = np.concatenate((self._parent, new))
        return new.reshape(shape)

    def find(self, labels: Facet) -> Facet:
        """The component of every label."""
        roots = self._parent[labels]
        while not np.array_equal(higher := self._parent[roots], roots):
            roots = higher
        self._parent[labels] = roots
        return roots

    def tie(self, first: Facet, second: Facet) -> None:
        """Elementwise, with broadcasting: these labels are removed together."""
        a, b = np.broadcast_arrays(self.find(first), self.find(second))
        different = a != b
        for x, y in np.unique(np.stack((a[different], b[different]), axis=-1), axis=0):
            low, high = sorted((self._root(x), self._root(y)))
            self._parent[high] = low

    def _root(self, label: int) -> int:
        while (parent := int(self._parent[label])) != label:
            label = parent
        return label

    def block(self, labels: Facet, why: str) -> None:
        """These labels are never removed."""
        self._blocked.append((labels, why))

    def note_merge(self, labels: Facet, why: str) -> None:
        """`labels` are one component because of `why`."""
        self._merged.append((labels, why))

    def mark_attention(self, labels: Facet) -> None:
        """Softmax normalises over what these labels stand for: they are attention heads."""
        self._attention.append(labels)

    def blocked(self) -> dict[int, str]:
        """Component -> the first reason why it stays."""
        return self._first(self._blocked)

    def merged(self) -> dict[int, str]:
        """Component -> the first reason why its channels hang together."""
        return self._first(self._merged)

    def attention(self) -> frozenset[int]:
        """Components that are attention heads."""
        return frozenset(int(root) for labels in self._attention for root in np.unique(self.find(labels)))

    def _first(self, notes: list[tuple[Facet, str]]) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for labels, why in notes:
            for root in np.unique(self.find(labels)):
                reasons.setdefault(int(root), why)
        return reasons


def varied(facet: Facet) -> frozenset[int]:
    """The axes along which the labels differ."""
    return frozenset(axis for axis, length in enumerate(facet.shape) if length > 1)


def outermost(facet: Facet) -> int | None:
    """The axis with the largest step between labels: heads, not the channels of a head."""
    steps = {axis: int(np.abs(np.diff(facet, axis=axis)).max()) for axis in varied(facet)}
    return max(steps, key=steps.__getitem__, default=None)
