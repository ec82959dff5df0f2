"""Live parameters: which elements of every parameter a set of units needs, from the graph alone.

A position of a parameter goes with its unit. A tensor whose units are all gone is not computed, and what only it
needs, such as the norm before it, goes too. The frozen graph is checked against this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import fx

from cpcompile.core.selection import BoolArray
from cpcompile.partitioning.channel_ids import Value
from cpcompile.partitioning.groups import Group, IntArray
from cpcompile.partitioning.trace import Traced, sources_of


@dataclass(frozen=True)
class LiveParameters:
    """Which parameters stay alive with which units; units are numbered over all groups."""

    shapes: Mapping[str, tuple[int, ...]]
    cut: Mapping[str, tuple[IntArray | None, ...]]
    """Parameter -> per axis the unit of every position, -1 where none."""
    sources: tuple[tuple[int, ...], ...]
    """Per tensor, in the order of the graph, the tensors that it is made from."""
    units: tuple[tuple[IntArray, ...], ...]
    """Per tensor sets of units: when all units of one set are gone, so is the tensor."""
    parameters: Mapping[int, str]
    outputs: tuple[int, ...]

    def kept(self, alive: BoolArray) -> dict[str, int]:
        """The number of elements of every parameter that are needed while these units are `alive`."""
        needed = set(self.outputs)
        for index in range(len(self.sources) - 1, -1, -1):
            if index in needed:
                needed.update(s for s in self.sources[index] if all(alive[units].any() for units in self.units[s]))
        names = {self.parameters[index] for index in needed if index in self.parameters}
        return {name: self._size(name, alive) if name in names else 0 for name in self.shapes}

    def unused(self, units: int) -> tuple[str, ...]:
        """Parameters that the forward pass does not read, with all `units` alive."""
        kept = self.kept(np.ones(units, dtype=np.bool_))
        return tuple(name for name, shape in self.shapes.items() if kept[name] < prod(shape))

    def _size(self, name: str, alive: BoolArray) -> int:
        axes = self.cut.get(name, (None,) * len(self.shapes[name]))
        lengths = (
            length if units is None else int(((units < 0) | alive[units]).sum())
            for length, units in zip(self.shapes[name], axes, strict=True)
        )
        return prod(lengths)


def find_live_parameters(traced: Traced, groups: Sequence[Group], unit_of_root: Mapping[int, int]) -> LiveParameters:
    """The live parameters of `traced`; `unit_of_root` maps the components of all groups to their units."""
    index: dict[fx.Node, int] = {}
    sources: list[tuple[int, ...]] = []
    units: list[tuple[IntArray, ...]] = []
    outputs: list[int] = []
    for node in traced.graph.nodes:
        read = tuple(index[source] for source in sources_of(node))
        index[node] = len(sources)
        sources.append(read)
        value = traced.flow.values.get(node)
        units.append(_removable(traced, value, unit_of_root) if isinstance(value, Value) else ())
        if node.op == "output":
            outputs.append(index[node])
    cut: dict[str, tuple[IntArray | None, ...]] = {}
    first = 0
    for group in groups:
        for name, axes in group.parameters.items():
            before = cut.get(name, (None,) * len(axes))
            cut[name] = tuple(_joined(a, b, first) for a, b in zip(before, axes, strict=True))
        first += group.units
    return LiveParameters(
        {name: tuple(tensor.shape) for name, tensor in traced.parameters.items()},
        cut,
        tuple(sources),
        tuple(units),
        {index[node]: name for node, name in traced.placeholders.items()},
        tuple(outputs),
    )


def _joined(before: IntArray | None, own: IntArray | None, first: int) -> IntArray | None:
    """The units of two groups on one axis; `own` counts from `first`."""
    if own is None:
        return before
    numbered = np.where(own >= 0, own + first, -1)
    return numbered if before is None else np.where(numbered >= 0, numbered, before)


def _removable(traced: Traced, value: Value, unit_of_root: Mapping[int, int]) -> tuple[IntArray, ...]:
    found = []
    for ids in value.channel_ids:
        roots = np.unique(traced.flow.coupling.find(ids)).tolist()
        if all(root in unit_of_root for root in roots):
            found.append(np.unique([unit_of_root[root] for root in roots]))
    return tuple(found)
