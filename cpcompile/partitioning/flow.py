"""Flow: labels carried through the operators of an exported graph.

The state of one walk over a graph and the four things that operators do with labels:

    merge       an operator mixes all positions of an axis: its labels become one
    agree       elementwise with broadcasting: aligned axes lose the same channels
    contract    x (.., k) with a weight (k, n): k's labels end here, n's begin; the place for a gate
    reshape     labels keep their places in memory order
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from cpcompile.partitioning.labels import Facet, Labels, Value, outermost, varied


@dataclass(frozen=True)
class Exit:
    """Channels of `source` that end in a contraction with a weight: `labels`, one per channel."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    labels: Facet


@dataclass
class Flow:
    """One walk over one graph."""

    labels: Labels = field(default_factory=Labels)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    """fx node -> Value, a list of Values, or None for what is no tensor."""
    exits: list[Exit] = field(default_factory=list)
    opaque: dict[fx.Node, str] = field(default_factory=dict)
    """Operators without a rule that read channels, and what is to be said of them."""
    _primes: dict[Any, int] = field(default_factory=dict)

    def value(self, argument: object) -> Value | None:
        """The value of an operator's argument; None for numbers and absent tensors."""
        found = self.values.get(argument) if isinstance(argument, fx.Node) else None
        return found if isinstance(found, Value) else None

    def tensors(self, node: fx.Node) -> list[Value]:
        """All tensors that `node` reads."""
        found = [self.values.get(argument) for argument in node.all_input_nodes]
        flat = [v for entry in found for v in (entry if isinstance(entry, list) else [entry])]
        return [v for v in flat if isinstance(v, Value)]

    def plain(self, example: torch.Tensor, *, constant: bool = False) -> Value:
        """A value of the shape of `example` of which no axis can be cut."""
        lengths = [self._length(dim) for dim in example.shape]
        return Value(tuple(n for n, _ in lengths), tuple(d for _, d in lengths), (), constant)

    def _length(self, dim: int | torch.SymInt) -> tuple[int, bool]:
        """A length that equals others exactly when the expression does: symbols stand for distinct large primes."""
        if isinstance(dim, int):
            return dim, False
        expression = dim.node.expr
        for symbol in sorted(expression.free_symbols - self._primes.keys(), key=str):
            self._primes[symbol] = _next_prime(100_003 + 1_000 * len(self._primes))
        return int(expression.subs(self._primes)), bool(expression.free_symbols)

    def merge(self, value: Value, axes: Iterable[int], why: str) -> Value:
        """The labels along `axes` become one; what a parameter then no longer varies on stays for good."""
        facets = []
        for facet in value.facets:
            kept = facet
            for axis in axes:
                if kept.shape[axis] > 1:
                    self.labels.tie(kept, kept.take([0], axis=axis))
                    self.labels.note_merge(kept, why)
                    kept = kept.take([0], axis=axis)
            if value.constant and kept is not facet and not varied(kept):
                self.labels.block(kept, why)
            else:
                facets.append(kept)
        return value.with_facets(facets)

    def agree(self, values: Sequence[Value], like: Value, why: str) -> Value:
        """The result of an elementwise operator of the shape of `like`."""
        lifted = [_lift(value, like.rank) for value in values]
        settled = False
        while not settled:
            lifted, first = self._only_common_axes(lifted, like.rank, why)
            lifted, second = self._same_grids(lifted, why)
            settled = not (first or second)
        facets: list[Facet] = []
        for index, value in enumerate(lifted):
            for facet in value.facets:
                for other in lifted[index + 1 :]:
                    for its in other.facets:
                        if varied(facet) == varied(its):
                            self.labels.tie(facet, its)
        for value in lifted:
            facets += value.facets
        return replace(like, facets=self.distinct(facets), constant=all(v.constant for v in values))

    def _only_common_axes(self, values: list[Value], rank: int, why: str) -> tuple[list[Value], bool]:
        """An axis that one of the tensors cannot lose channels of is whole in all of them."""
        changed = False
        for axis in range(rank):
            members = [i for i, value in enumerate(values) if value.shape[axis] != 1]
            lengths = {max((f.shape[axis] for f in values[i].facets), default=1) for i in members}
            if len(lengths) > 1:
                changed = True
                for i in members:
                    values[i] = self.merge(values[i], [axis], why)
        return values, changed

    def _same_grids(self, values: list[Value], why: str) -> tuple[list[Value], bool]:
        """Facets that share axes vary on the same ones; of heads and their channels the heads stay."""
        for i, value in enumerate(values):
            for facet in value.facets:
                for j, other in enumerate(values):
                    for its in other.facets:
                        shared, extra = varied(facet) & varied(its), varied(facet) - varied(its)
                        if i == j or not shared or not extra:
                            continue
                        if outermost(facet) in shared:
                            values[i] = self.merge(value, extra, why)
                        else:
                            values[i] = self.merge(value, shared, why)
                            values[j] = self.merge(other, shared, why)
                        return values, True
        return values, False

    def distinct(self, facets: Iterable[Facet]) -> tuple[Facet, ...]:
        """Each facet once; axes along which all labels are now of one component are left out."""
        kept: dict[tuple[tuple[int, ...], bytes], Facet] = {}
        for facet in facets:
            roots, shown = self.labels.find(facet), facet
            for axis in varied(facet):
                if (roots == roots.take([0], axis=axis)).all():
                    roots, shown = roots.take([0], axis=axis), shown.take([0], axis=axis)
            kept.setdefault((roots.shape, roots.tobytes()), shown)
        return tuple(kept.values())

    def contract(self, node: fx.Node, source: fx.Node, weight: fx.Node, axes: tuple[int, int, int, int]) -> Value:
        """x (.., k, ..) with a weight; `axes` are x's k, the weight's k and n, and n in the result."""
        x, w, out = self.value(source), self.value(weight), self.plain(node.meta["val"])
        assert x is not None and w is not None
        xk, wk, wn, on = axes
        why = f"{place(node)} sums over it"
        for facet in x.facets:  # a grid over heads and their channels: each head is projected by the same weight
            if xk in varied(facet) and len(varied(facet)) > 1:
                drop = varied(facet) - {xk} if outermost(facet) == xk else {xk}
                x = self.merge(x, drop, why)
        w = self.merge(w, set(range(w.rank)) - {wk, wn}, why)
        inputs = [facet.reshape(-1) for facet in w.facets if wk in varied(facet)]
        ending = [facet.reshape(-1) for facet in x.facets if varied(facet) in (frozenset({xk}), frozenset())]
        if inputs:
            for ends in ending:
                self.labels.tie(inputs[0], ends)
            if not ending:
                carried = any(varied(facet) for facet in x.facets)
                what = "is applied to every head alike" if carried else "reads channels that no parameter makes"
                self.labels.block(inputs[0], self._lost(source) or f"{place(node)} {what}")
            self.exits.append(Exit(node, source, weight, inputs[0]))
        else:
            for facet in x.facets:
                self.labels.block(facet, f"{place(node)} computes its weight")
        rest = [f for f in x.facets if varied(f) and xk not in varied(f)]
        facets = [_place(f, {a: a for a in varied(f)}, out.rank) for f in rest]
        facets += [_place(f, {wn: on}, out.rank) for f in w.facets if wn in varied(f)]
        return replace(out, facets=self.distinct(facets), constant=x.constant)

    def _lost(self, node: fx.Node) -> str | None:
        """The operator on the way to `node` that labels could not be followed through."""
        waiting, seen = [node], {node}
        while waiting:
            at = waiting.pop()
            if at in self.opaque:
                return self.opaque[at]
            sources = [s for s in at.all_input_nodes if s not in seen and not getattr(self.value(s), "facets", ())]
            seen.update(sources)
            waiting += sources
        return None

    def reshape(self, value: Value, like: Value, why: str) -> Value:
        """Labels in memory order in the new shape."""
        groups = _axis_groups(value.shape, like.shape)
        facets: list[Facet] = []
        for facet in value.facets:
            source, target = list(facet.shape), [1] * like.rank
            for first, second in groups:
                _spread(facet.shape, value, like, first, second, source, target)
            lost = [axis for axis, length in enumerate(source) if length < facet.shape[axis]]
            merged = self.merge(value.with_facets([facet]), lost, why).facets
            facets += [np.broadcast_to(kept, source).reshape(target) for kept in merged]
        return replace(like, facets=tuple(facets), constant=value.constant)

    def block_all(self, values: Iterable[Value], why: str) -> None:
        """Nothing that these tensors hold can be removed."""
        for value in values:
            for facet in value.facets:
                self.labels.block(facet, why)


_CALL = re.compile(r"@\d+")
"""What torch.export adds to the path of a module that is called again."""


def place(node: fx.Node) -> str:
    """The operator and the module in whose forward it runs, for messages."""
    where = module_path(node)
    name = str(node.target).removeprefix("aten.").split(".")[0]
    return f"{name} in {where}" if where else name


def module_path(node: fx.Node) -> str:
    """The innermost module in whose forward `node` runs; empty for the model itself."""
    stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    known = [path for path in stack if path == "model" or path.startswith("model.")]
    return _CALL.sub("", known[-1].removeprefix("model").removeprefix(".")) if known else ""


def _lift(value: Value, rank: int) -> Value:
    """Leading axes of length 1, as broadcasting adds them."""
    more = rank - value.rank
    return Value(
        (1,) * more + value.shape,
        (False,) * more + value.dynamic,
        tuple(facet.reshape((1,) * more + facet.shape) for facet in value.facets),
        value.constant,
    )


def _place(facet: Facet, axes: dict[int, int], rank: int) -> Facet:
    """The facet with its axes at other places of a tensor of `rank`; the order of axes stays."""
    shape = [1] * rank
    for old, new in axes.items():
        shape[new] = facet.shape[old]
    return facet.reshape(shape)


def _axis_groups(first: tuple[int, ...], second: tuple[int, ...]) -> list[tuple[range, range]]:
    """The smallest ranges of neighbouring axes that a reshape maps to each other."""
    groups, i, j = [], 0, 0
    while i < len(first) or j < len(second):
        start_i, start_j = i, j
        a = b = 1
        while a != b or (i == start_i and j == start_j):
            if i < len(first) and (a <= b or j == len(second)):
                a, i = a * first[i], i + 1
            else:
                b, j = b * second[j], j + 1
        groups.append((range(start_i, i), range(start_j, j)))
    return groups


def _spread(
    own: tuple[int, ...], value: Value, like: Value, first: range, second: range, source: list[int], target: list[int]
) -> None:
    """How long a facet of lengths `own` has to be along the axes `first` (source) and is along `second` (target)."""
    if all(own[axis] == 1 for axis in first):
        return
    length = 1
    inside = True
    for axis in reversed(first):  # the last axes, up to a dynamic one, along which labels may repeat
        source[axis] = 1 if not inside else own[axis] if value.dynamic[axis] else value.shape[axis]
        length *= source[axis]
        inside = inside and not value.dynamic[axis]
    for axis in reversed(second):
        if like.dynamic[axis]:
            target[axis], length = length, 1
        elif length > 1:
            target[axis], rest = like.shape[axis], length % like.shape[axis]
            length = length // like.shape[axis] if rest == 0 else 0
    if length != 1:  # the labels do not fit: they become one
        for axis in first:
            source[axis] = 1
        for axis in second:
            target[axis] = 1


def _next_prime(start: int) -> int:
    number = start
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number
