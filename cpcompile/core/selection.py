"""Units, and which of them each context keeps.

A *unit* is the smallest part of a model that can be removed. A *selection* is a table
contexts x units per layer and kind; the units that the same set of contexts keeps form a
*partition*, and the partition kept by all contexts is the *core*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
Digits = dict[str, list[dict[str, Any]]]
"""kind -> per layer {name, kept: context -> a digit per unit, 1 where the context keeps it}."""


class UnitKind(StrEnum):
    """The kinds of units."""

    FFN = "ffn"
    """A block of `align` hidden channels of a feed-forward network."""
    HEAD = "head"
    """An attention head; with grouped-query attention a key/value head and its query heads."""
    VOCABULARY = "vocabulary"
    """A row of the embedding and of the output head."""
    EXPERT = "expert"
    """An expert of a mixture-of-experts layer."""
    LAYER = "layer"
    """A whole layer with no units left."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of one kind in a model: `count` of them in each of `layers` layers, each `width` channels wide."""

    kind: UnitKind
    layers: int
    count: int
    width: int


@dataclass(frozen=True)
class Selection:
    """Which units every context keeps.

    `kept` maps a kind to a boolean array of shape (contexts, layers, units); a kind that is
    absent is kept whole.
    """

    contexts: tuple[str, ...]
    kept: Mapping[UnitKind, BoolArray]

    def __post_init__(self) -> None:
        for kind, table in self.kept.items():
            if table.dtype != np.bool_ or table.ndim != 3 or table.shape[0] != len(self.contexts):
                raise ValueError(
                    f"selection of {kind}: expected a boolean array of shape "
                    f"({len(self.contexts)}, layers, units), got {table.dtype} {table.shape}"
                )

    def row(self, context: str) -> dict[UnitKind, BoolArray]:
        """The units that `context` keeps: an array (layers, units) per kind."""
        index = self.contexts.index(context)
        return {kind: table[index] for kind, table in self.kept.items()}

    def digits(self, layers: Mapping[UnitKind, Sequence[tuple[str, int]]]) -> Digits:
        """The table as text, for people and reports; `layers` gives the name and number of units of every layer.

        A table may have more columns than a layer has units.
        """
        return {
            str(kind): [
                {
                    "name": name,
                    "kept": {
                        context: "".join("01"[int(unit)] for unit in table[index, layer, :units])
                        for index, context in enumerate(self.contexts)
                    },
                }
                for layer, (name, units) in enumerate(layers[kind])
            ]
            for kind, table in self.kept.items()
            if kind in layers
        }

    def to_plain(self) -> dict[str, object]:
        """The selection in plain containers, for a checkpoint or a JSON file."""
        return {
            "contexts": list(self.contexts),
            "kept": {str(kind): table.astype(int).tolist() for kind, table in self.kept.items()},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, object]) -> Selection:
        """The inverse of `to_plain`; raises ValueError or KeyError on anything else."""
        contexts, kept = plain["contexts"], plain["kept"]
        if not isinstance(contexts, list) or not isinstance(kept, dict):
            raise ValueError("a selection holds a list of contexts and a table per kind")
        return cls(
            tuple(str(c) for c in contexts),
            {UnitKind(kind): np.asarray(table, dtype=np.bool_) for kind, table in kept.items()},
        )
