"""Flow: channel ids carried through the operators of an exported graph.

A `Flow` is the state of one walk over a graph. Operators do four things with ids:

    merge       an operator mixes all positions of an axis: their ids are coupled
    agree       elementwise with broadcasting: aligned axes lose the same channels
    contract    x (.., k) with a weight (k, n): k's ids end here, n's begin; the place for a gate
    reshape     ids keep their places in memory order
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from cpcompile.core.reshape import AxisGroup, match_axes
from cpcompile.partitioning.channel_ids import ChannelIds, Coupling, Value, outermost, varied


@dataclass(frozen=True)
class Contraction:
    """Contraction of `source` with a weight, in which channels end: `ids`, one per channel."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    ids: ChannelIds


@dataclass
class Flow:
    """One walk over one graph."""

    coupling: Coupling = field(default_factory=Coupling)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    """fx node -> Value, a list of Values, or None if it is no tensor."""
    contractions: list[Contraction] = field(default_factory=list)
    opaque: dict[fx.Node, str] = field(default_factory=dict)
    """Operators without a rule that read channels -> why these channels stay."""
    joined_heads: list[tuple[ChannelIds, int, fx.Node]] = field(default_factory=list)
    """An id that stands for several attention heads, how many, and the operator that couples them."""
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
        """A value with the shape of `example` and no axis that can be cut."""
        lengths = [self._length(dim) for dim in example.shape]
        return Value(tuple(n for n, _ in lengths), tuple(d for _, d in lengths), (), constant)

    def _length(self, dim: int | torch.SymInt) -> tuple[int, bool]:
        """A length that equals another only if the expressions are equal: symbols stand for different large primes."""
        if isinstance(dim, int):
            return dim, False
        expression = dim.node.expr
        for symbol in sorted(expression.free_symbols - self._primes.keys(), key=str):
            self._primes[symbol] = _next_prime(100_003 + 1_000 * len(self._primes))
        return int(expression.subs(self._primes)), bool(expression.free_symbols)

    def merge(self, value: Value, axes: Iterable[int], why: str) -> Value:
        """Couple all ids along `axes`; a parameter whose ids then vary on no axis is never cut."""
        channel_ids = []
        for ids in value.channel_ids:
            kept = ids
            for axis in axes:
                if kept.shape[axis] > 1:
                    self.coupling.couple(kept, kept.take([0], axis=axis))
                    self.coupling.note_merge(kept, why)
                    kept = kept.take([0], axis=axis)
            if value.constant and kept is not ids and not varied(kept):
                self.coupling.block(kept, why)
            else:
                channel_ids.append(kept)
        return value.with_ids(channel_ids)

    def agree(self, values: Sequence[Value], like: Value, why: str) -> Value:
        """The result of an elementwise operator, in the shape of `like`."""
        lifted = [_lift(value, like.rank) for value in values]
        settled = False
        while not settled:
            lifted, first = self._only_common_axes(lifted, like.rank, why)
            lifted, second = self._same_grids(lifted, why)
            settled = not (first or second)
        channel_ids: list[ChannelIds] = []
        for index, value in enumerate(lifted):
            for ids in value.channel_ids:
                for other in lifted[index + 1 :]:
                    for its in other.channel_ids:
                        if varied(ids) == varied(its):
                            self.coupling.couple(ids, its)
        for value in lifted:
            channel_ids += value.channel_ids
        return replace(like, channel_ids=self.distinct(channel_ids), constant=all(v.constant for v in values))

    def _only_common_axes(self, values: list[Value], rank: int, why: str) -> tuple[list[Value], bool]:
        """An axis on which one of the tensors cannot lose channels stays whole in all of them."""
        changed = False
        for axis in range(rank):
            members = [i for i, value in enumerate(values) if value.shape[axis] != 1]
            lengths = {max((f.shape[axis] for f in values[i].channel_ids), default=1) for i in members}
            if len(lengths) > 1:
                changed = True
                for i in members:
                    values[i] = self.merge(values[i], [axis], why)
        return values, changed

    def _same_grids(self, values: list[Value], why: str) -> tuple[list[Value], bool]:
        """Arrays of ids that share an axis vary on the same axes; of heads and their channels, heads stay apart."""
        for i, value in enumerate(values):
            for ids in value.channel_ids:
                for j, other in enumerate(values):
                    for its in other.channel_ids:
                        shared, extra = varied(ids) & varied(its), varied(ids) - varied(its)
                        if i == j or not shared or not extra:
                            continue
                        if outermost(ids) in shared:
                            values[i] = self.merge(value, extra, why)
                        else:
                            values[i] = self.merge(value, shared, why)
                            values[j] = self.merge(other, shared, why)
                        return values, True
        return values, False

    def distinct(self, channel_ids: Iterable[ChannelIds]) -> tuple[ChannelIds, ...]:
        """Each array once; axes along which all ids are now in one component are left out."""
        kept: dict[tuple[tuple[int, ...], bytes], ChannelIds] = {}
        for ids in channel_ids:
            roots, shown = self.coupling.find(ids), ids
            for axis in varied(ids):
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
        for ids in x.channel_ids:  # a grid over heads and their channels: each head is projected by the same weight
            if xk in varied(ids) and len(varied(ids)) > 1:
                drop = varied(ids) - {xk} if outermost(ids) == xk else {xk}
                x = self.merge(x, drop, why)
        w = self.merge(w, set(range(w.rank)) - {wk, wn}, why)
        inputs = [ids.reshape(-1) for ids in w.channel_ids if wk in varied(ids)]
        ending = [ids.reshape(-1) for ids in x.channel_ids if varied(ids) in (frozenset({xk}), frozenset())]
        if inputs:
            for ends in ending:
                self.coupling.couple(inputs[0], ends)
            if not ending:
                carried = any(varied(ids) for ids in x.channel_ids)
                what = "is applied to every head alike" if carried else "reads channels that no parameter makes"
                self.coupling.block(inputs[0], self._lost(source) or f"{place(node)} {what}")
            self.contractions.append(Contraction(node, source, weight, inputs[0]))
        else:
            for ids in x.channel_ids:
                self.coupling.block(ids, f"{place(node)} computes its weight")
        rest = [f for f in x.channel_ids if varied(f) and xk not in varied(f)]
        channel_ids = [_place(f, {a: a for a in varied(f)}, out.rank) for f in rest]
        channel_ids += [_place(f, {wn: on}, out.rank) for f in w.channel_ids if wn in varied(f)]
        return replace(out, channel_ids=self.distinct(channel_ids), constant=x.constant)

    def _lost(self, node: fx.Node) -> str | None:
        """Why ids did not reach `node`: the operator without a rule on the way to it."""
        waiting, seen = [node], {node}
        while waiting:
            at = waiting.pop()
            if at in self.opaque:
                return self.opaque[at]
            sources = [s for s in at.all_input_nodes if s not in seen and not getattr(self.value(s), "channel_ids", ())]
            seen.update(sources)
            waiting += sources
        return None

    def reshape(self, value: Value, like: Value, why: str) -> Value:
        """The ids in memory order, in the new shape."""
        groups = match_axes(value.shape, like.shape, prod)
        if groups is None:  # an empty tensor
            groups = [AxisGroup(range(value.rank), range(like.rank))]
        channel_ids: list[ChannelIds] = []
        for ids in value.channel_ids:
            source, target = list(ids.shape), [1] * like.rank
            for first, second in groups:
                _spread(ids.shape, value, like, first, second, source, target)
            lost = [axis for axis, length in enumerate(source) if length < ids.shape[axis]]
            merged = self.merge(value.with_ids([ids]), lost, why).channel_ids
            channel_ids += [np.broadcast_to(kept, source).reshape(target) for kept in merged]
        return replace(like, channel_ids=tuple(channel_ids), constant=value.constant)

    def mark_attention(self, node: fx.Node, ids: ChannelIds, scores: Value) -> None:
        """`node` normalises `scores` (batch, heads, queries, keys): channels with these ids are attention heads."""
        self.coupling.mark_attention(ids)
        if ids.size == 1 and scores.rank > 3 and scores.shape[-3] > 1 and not scores.dynamic[-3]:
            self.joined_heads.append((ids, scores.shape[-3], self._joining(node)))

    def _joining(self, node: fx.Node) -> fx.Node:
        """The operator, `node` or one before it, that couples all channels of what it reads."""
        waiting, seen = [node], {node}
        while waiting:
            at = waiting.pop(0)
            sources = [source for source in at.all_input_nodes if self.value(source) is not None]
            if any(varied(ids) for source in sources for ids in self.values[source].channel_ids):
                return at
            waiting += [source for source in sources if source not in seen]
            seen.update(sources)
        return node

    def block_all(self, values: Iterable[Value], why: str) -> None:
        """No channel of these tensors can be removed."""
        for value in values:
            for ids in value.channel_ids:
                self.coupling.block(ids, why)


_CALL = re.compile(r"@\d+")
"""The suffix that torch.export adds to the path of a module that is called again."""


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
    """Add leading axes of length 1, as broadcasting does."""
    more = rank - value.rank
    return Value(
        (1,) * more + value.shape,
        (False,) * more + value.dynamic,
        tuple(ids.reshape((1,) * more + ids.shape) for ids in value.channel_ids),
        value.constant,
    )


def _place(ids: ChannelIds, axes: dict[int, int], rank: int) -> ChannelIds:
    """The ids with their axes at other places of a tensor of `rank`, in the same order."""
    shape = [1] * rank
    for old, new in axes.items():
        shape[new] = ids.shape[old]
    return ids.reshape(shape)


def _spread(
    own: tuple[int, ...], value: Value, like: Value, first: range, second: range, source: list[int], target: list[int]
) -> None:
    """Lengths of an array of ids, which are `own` now: in `source` along axes `first`, in `target` along `second`."""
    if all(own[axis] == 1 for axis in first):
        return
    length = 1
    inside = True
    for axis in reversed(first):  # the last axes, up to a dynamic one, along which ids may repeat
        source[axis] = 1 if not inside else own[axis] if value.dynamic[axis] else value.shape[axis]
        length *= source[axis]
        inside = inside and not value.dynamic[axis]
    for axis in reversed(second):
        if like.dynamic[axis]:
            target[axis], length = length, 1
        elif length > 1:
            target[axis], rest = like.shape[axis], length % like.shape[axis]
            length = length // like.shape[axis] if rest == 0 else 0
    if length != 1:  # the ids do not fit: they become one
        for axis in first:
            source[axis] = 1
        for axis in second:
            target[axis] = 1


def _next_prime(start: int) -> int:
    number = start
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number
