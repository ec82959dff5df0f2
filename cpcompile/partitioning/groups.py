"""Groups: from coupled channels to what can be gated.

Channels with the same component are removed together. Components that run through the same parameters form a group
(the hidden channels of one feed-forward network, the heads of one attention); a group is divided into units.
All consumers of a group, the contractions in which its channels end, get the same gates.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import fx

from cpcompile.core.selection import UnitKind
from cpcompile.partitioning.channel_ids import varied
from cpcompile.partitioning.flow import Contraction, Flow, module_path, place
from cpcompile.partitioning.trace import Traced

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Consumer:
    """A module whose input is gated; for experts, first the router, then the module that has their weights."""

    module: str
    parameter: str
    axis: int
    """The gated axis of the module's first input: counted from the end, or 1 for channels of a convolution."""
    unit_of_channel: IntArray


@dataclass(frozen=True, eq=False)  # holds arrays, which have no single equality
class Group:
    """Coupled channels that can be removed unit by unit."""

    name: str
    kind: UnitKind
    units: int
    width: int
    """Channels of one unit at the first consumer; the last unit may be smaller."""
    consumers: tuple[Consumer, ...]
    parameters: Mapping[str, tuple[IntArray | None, ...]]
    """Parameter -> per axis the unit of every position, or -1; None for an axis that stays whole."""
    fewest: int = 0
    """The minimum number of units a context keeps: the experts that the router picks for a token."""


@dataclass(frozen=True)
class Refused:
    """Channels that cannot be gated, and why: those that a linear layer or convolution reads, or of a parameter."""

    name: str
    channels: int
    consumers: tuple[str, ...]
    reason: str
    parameters: tuple[str, ...] = ()
    """Parameters with these channels."""

    def __str__(self) -> str:
        return f"{self.name} ({self.channels} channels): {self.reason}"


@dataclass(frozen=True)
class _Candidate:
    """Components that end in the same contractions."""

    contractions: tuple[Contraction, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """All groups of a graph, with the components and calls behind each."""

    groups: tuple[Group, ...]
    refused: tuple[Refused, ...]
    _units: tuple[Mapping[int, int], ...]
    _calls: tuple[Counter[str], ...]

    def unit_numbers(self, groups: Sequence[Group]) -> dict[int, int]:
        """Component -> unit, numbered over `groups`."""
        numbers: dict[int, int] = {}
        first = 0
        for group in groups:
            own = self._units[self.groups.index(group)]
            numbers |= {root: first + unit for root, unit in own.items()}
            first += group.units
        return numbers

    def __add__(self, other: Found) -> Found:
        """The groups of both, in this order."""
        return Found(
            self.groups + other.groups,
            self.refused + other.refused,
            self._units + other._units,
            self._calls + other._calls,
        )

    def calls(self, groups: Sequence[Group]) -> Counter[tuple[str, str]]:
        """How often one forward pass reads channels of a group: (group, module of the consumer) -> calls."""
        pairs = [(group.name, self._calls[self.groups.index(group)]) for group in groups]
        return Counter({(name, module): count for name, calls in pairs for module, count in calls.items()})


def find_groups(traced: Traced, align: int) -> Found:
    """What can be gated in units of at least `align` channels (a head is always one unit), and what cannot."""
    flow = traced.flow
    blocked, merged, attention = flow.coupling.blocked(), flow.coupling.merged(), flow.coupling.attention()
    groups: list[Group] = []
    refused: list[Refused] = []
    numbers: list[Mapping[int, int]] = []
    calls: list[Counter[str]] = []
    for candidate in _candidates(traced):
        reasons = {root: blocked[root] for root in candidate.roots if root in blocked}
        open_roots = [root for root in candidate.roots if root not in reasons]
        for reason in dict.fromkeys(reasons.values()):
            refused.append(_refused(traced, candidate, [r for r, why in reasons.items() if why == reason], reason))
        if not open_roots:
            continue
        is_attention = attention.issuperset(open_roots)
        why = "" if len(open_roots) > 1 or is_attention else merged.get(open_roots[0], "it is a single channel")
        unit_of_root, units, width = _units(flow, candidate.contractions[0], open_roots, 1 if is_attention else align)
        if not why and units == 1 and not is_attention:
            count = _channels(flow, candidate.contractions[0], open_roots)
            why = f"its {count} channels are one unit of {align}: choose a smaller align"
        consumers = why or _consumers(traced, candidate.contractions, unit_of_root)
        if isinstance(consumers, str):
            refused.append(_refused(traced, candidate, open_roots, consumers))
            continue
        if joined := _joined_heads(flow, open_roots):
            refused.append(_refused(traced, candidate, open_roots, joined))
        cut = _cut_of(traced, unit_of_root)
        kind = UnitKind.HEAD if is_attention else UnitKind.FFN
        calls.append(Counter(consumer.module for consumer in consumers))
        numbers.append(unit_of_root)
        once = tuple({consumer.module: consumer for consumer in consumers}.values())
        groups.append(Group(common_name(cut, once), kind, units, width, once, cut))
    return Found(_with_own_names(groups), tuple(refused), tuple(numbers), tuple(calls))


def find_whole(traced: Traced, groups: Sequence[Group], found: Found, unused: Collection[str]) -> tuple[Refused, ...]:
    """Why the parameters with more than one axis stay whole that are in none of `groups` and not refused yet."""
    whole = []
    for group in (group for group in found.groups if group not in groups):
        modules = tuple(consumer.module for consumer in group.consumers)
        why = f"kinds leaves out {group.kind}"
        whole.append(Refused(group.name, group.units * group.width, modules, why, tuple(group.parameters)))
    known = {name for group in groups for name in group.parameters}
    known |= {name for refused in (*found.refused, *whole) for name in refused.parameters}
    blocked, merged = traced.flow.coupling.blocked(), traced.flow.coupling.merged()
    for name, axes in traced.parameter_axes.items():
        if len(axes) < 2 or name in known:
            continue
        roots = [int(root) for ids in axes if ids is not None for root in np.unique(traced.flow.coupling.find(ids))]
        reasons = [why[root] for why in (blocked, merged) for root in roots if root in why]
        reason = _UNUSED if name in unused else next(iter(reasons), _NO_READER)
        shape = traced.parameters[name].shape
        whole.append(Refused(name, max(shape), (name.rpartition(".")[0] or name,), reason, (name,)))
    return tuple(whole)


_UNUSED = "the forward pass does not read it"
_NO_READER = "no linear layer or convolution reads its channels"


def _candidates(traced: Traced) -> list[_Candidate]:
    """Components with the same parameter axes that end in the same contractions, in the order of the graph."""
    flow = traced.flow
    touched: dict[int, set[object]] = defaultdict(set)
    ends: dict[int, list[int]] = defaultdict(list)
    for name, axes in traced.parameter_axes.items():
        for axis, ids in enumerate(axes):
            for root in np.unique(flow.coupling.find(ids)) if ids is not None else ():
                touched[int(root)].add((name, axis))
    order: dict[int, int] = {}
    for index, contraction in enumerate(flow.contractions):
        roots, positions = np.unique(flow.coupling.find(contraction.ids), return_index=True)
        for root, position in zip(roots.tolist(), positions.tolist(), strict=True):
            ends[root].append(index)
            order.setdefault(root, (index << 32) + position)
    together: dict[object, list[int]] = defaultdict(list)
    for root in sorted(order, key=order.__getitem__):
        together[frozenset(touched[root]), tuple(ends[root])].append(root)
    return [
        _Candidate(tuple(flow.contractions[index] for index in ends[roots[0]]), tuple(roots))
        for roots in together.values()
    ]


def _units(flow: Flow, contraction: Contraction, roots: Sequence[int], align: int) -> tuple[dict[int, int], int, int]:
    """Component -> unit, the number of units, and the channels of one unit."""
    per_root = _channels(flow, contraction, roots) // len(roots)
    block = max(1, -(-align // per_root))
    unit_of_root = {root: index // block for index, root in enumerate(roots)}
    return unit_of_root, -(-len(roots) // block), block * per_root


def _channels(flow: Flow, contraction: Contraction, roots: Iterable[int]) -> int:
    return int(np.isin(flow.coupling.find(contraction.ids), list(roots)).sum())


def _joined_heads(flow: Flow, roots: Sequence[int]) -> str | None:
    """Why heads cannot be removed one by one; None if they can, or if there is only one."""
    for ids, heads, by in flow.joined_heads if len(roots) == 1 else ():
        if flow.coupling.find(ids).item() == roots[0]:
            return f"its {heads} heads are one unit, because {place(by)} couples them"
    return None


def _consumers(
    traced: Traced, contractions: Sequence[Contraction], unit_of_root: Mapping[int, int]
) -> list[Consumer] | str:
    """The consumer of every contraction; or why there is none."""
    consumers: dict[str, Consumer] = {}
    calls = []
    for contraction in contractions:
        consumer = _consumer(traced, contraction, unit_of_root)
        if isinstance(consumer, str):
            return consumer
        before = consumers.setdefault(consumer.module, consumer)
        if before.axis != consumer.axis or not np.array_equal(before.unit_of_channel, consumer.unit_of_channel):
            return f"{consumer.module} reads other channels in another call"
        calls.append(consumer)
    return calls


def _consumer(traced: Traced, contraction: Contraction, unit_of_root: Mapping[int, int]) -> Consumer | str:
    """The module whose input the gate multiplies; or why there is none."""
    parameter, path = traced.parameter_of(contraction.weight), module_path(contraction.node)
    if parameter is None:
        return f"{place(contraction.node)} computes its weight"
    tensor, layer = traced.parameters[parameter], traced.model.get_submodule(path)
    if not any(own is tensor for own in layer.parameters(recurse=False)):
        return f"{place(contraction.node)} uses {parameter} by a function: let a module such as nn.Linear do it"
    entry = _entry(contraction.source, path)
    if entry is None or inputs_of(traced, contraction.node) != {entry}:
        name = path or type(traced.model).__name__
        return (
            f"{name} computes what {place(contraction.node)} reads: let a module of its own, such as nn.Linear, read it"
        )
    value = traced.flow.values[entry]
    wanted = traced.flow.coupling.find(contraction.ids)
    for axis in range(value.rank):
        for ids in value.channel_ids:
            roots = traced.flow.coupling.find(ids.reshape(-1))
            if varied(ids) <= {axis} and value.shape[axis] == wanted.size and (wanted == roots).all():
                units = np.array([unit_of_root.get(int(root), -1) for root in wanted], dtype=np.int64)
                name = next(name for name, module in traced.model.named_modules() if module is layer)  # of several
                return Consumer(name, parameter, axis - value.rank, units)
    return f"the channels that {path} reads do not lie along one axis of its input"


def inputs_of(traced: Traced, node: fx.Node) -> set[fx.Node]:
    """Activations from outside that the innermost module around `node` reads in this call."""
    stack = list(node.meta["nn_module_stack"])
    inside = {n for n in node.graph.nodes if list(n.meta.get("nn_module_stack") or ())[: len(stack)] == stack}
    read = {source for n in inside for source in n.all_input_nodes} - inside
    values = {source: traced.flow.value(source) for source in read}
    return {source for source, value in values.items() if value is not None and not value.constant}


def _entry(source: fx.Node, path: str) -> fx.Node | None:
    """Follow `source` back to the input of module `path`, through operators that only change its shape."""
    while source.op == "call_function" and module_path(source) == path:
        before = source.args[0] if source.args else None
        operator = str(source.target).removeprefix("aten.").split(".")[0]
        if not isinstance(before, fx.Node) or operator not in _SHAPES:
            return None
        source = before
    return source


_SHAPES = ("view", "reshape", "flatten", "contiguous", "clone", "to", "_to_copy")
"""Operators that a module may apply to its input before it reads the channels."""


def _cut_of(traced: Traced, unit_of_root: Mapping[int, int]) -> dict[str, tuple[IntArray | None, ...]]:
    """Parameters that lose positions with the units -> per axis the unit of every position."""
    coupling = traced.flow.coupling
    unit_of = np.full(coupling.count, -1, dtype=np.int64)
    unit_of[list(unit_of_root)] = list(unit_of_root.values())
    cut: dict[str, tuple[IntArray | None, ...]] = {}
    for name, axes in traced.parameter_axes.items():
        units = tuple(None if own is None else unit_of[coupling.find(own)] for own in axes)
        units = tuple(None if own is None or (own < 0).all() else own for own in units)
        if any(axis is not None for axis in units):
            cut[name] = units
    return cut


def common_name(cut: Mapping[str, object], consumers: Sequence[Consumer]) -> str:
    """The module that all parameters of the group belong to; the consumer if that is the whole model."""
    owners = [name.split(".")[:-1] for name in cut]
    common = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or consumers[0].module


def _with_own_names(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Name groups of the same module by their consumers."""
    count = Counter(group.name for group in groups)
    return tuple(replace(g, name=g.consumers[0].module) if count[g.name] > 1 else g for g in groups)


def _refused(traced: Traced, candidate: _Candidate, roots: Sequence[int], reason: str) -> Refused:
    names = [
        traced.parameter_of(contraction.weight) or place(contraction.node) for contraction in candidate.contractions
    ]
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    own = tuple(_cut_of(traced, dict.fromkeys(roots, 0)))
    return Refused(modules[0], _channels(traced.flow, candidate.contractions[0], roots), modules, reason, own)
