"""Run two graphs side by side, node by node, and yield the values that both have.

    reference   n1 -> a    n2 -> b               n3 -> c
    engine      m1 -> a    m2 -> t    m3 -> b    m4 -> c         t is the engine's own
                      ^ the reference's a     ^ its b

Values correspond by name. With `forced`, what the engine reads is the reference's value wherever there is one: a
difference in b is then made by m2 and m3, however wrong a was. Without, the engine reads its own, and errors add up.

The engine's order leads, the reference is run as far as its values are needed, and a value is freed after its last
reader: in memory are the weights of one node and the values between here and there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from cpcompile.core.cache import complete
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.passes.cache_interface import input_shapes
from cpcompile.validation.fragment import Fragment, Values, read_tensor


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A value that both graphs have."""

    name: str
    expected: Any
    """The reference's."""
    got: Any
    """The engine's; None if it raised."""
    error: str | None = None
    """What the engine raised."""
    fragment: Fragment
    """The nodes of the engine that made it from `given`; none if it is a constant there."""
    given: Values = field(default_factory=dict)
    twin: ir.Node | None
    """The node of the reference that made it."""


@dataclass(frozen=True)
class _Own:
    """A value that the engine's nodes read, and how the engine made it, where it is its own alone."""

    value: Any
    nodes: tuple[ir.Node, ...] = ()
    given: Values = field(default_factory=dict)


def run_in_lockstep(
    reference: ir.Model, engine: ir.Model, feeds: Values, *, sliced: bool = False, forced: bool = True
) -> Iterator[Pair]:
    """The values that both graphs have, in the engine's topological order; after an error there are no more.

    sliced: channels of the reference were removed from the engine. What has another shape there has no counterpart
    then; otherwise it is a pair like all others.
    UsageError: `feeds` lack an input. CpcompileError: the reference cannot be run.
    """
    followed = _Reference(reference, feeds, {name for name in _names(engine) if name is not None})
    own = {name: _Own(array, given={name: array}) for name, array in _inputs(engine, feeds).items()}
    readers = Counter(name for node in engine.graph for name in Fragment(engine, (node,)).reads)
    for node in engine.graph:
        fragment = Fragment(engine, (node,))
        for name, value in fragment.reads.items():
            if name not in own and value.const_value is not None and name in followed.producers:
                got = read_tensor(value.const_value)
                pair = Pair(
                    name=name,
                    expected=followed.take(name),
                    got=got,
                    fragment=Fragment(engine, ()),
                    twin=followed.producers[name],
                )
                own[name] = _Own(got)
                if _comparable(pair, sliced):
                    yield pair
                    own[name] = _Own(pair.expected if forced else got, given={name: pair.expected})
        read = [own[name] for name in fragment.reads if name in own]
        whole = Fragment(engine, _in_order([*(n for one in read for n in one.nodes), node]))
        given = {name: value for one in read for name, value in one.given.items()}
        names = [out.name for out in node.outputs if out.name]
        results, error = _attempt(fragment, {n: own[n].value for n in fragment.reads if n in own}, names)
        for name, got in zip(names, results, strict=True):
            own[name] = _Own(got, whole.nodes, given)
            if name not in followed:
                continue
            pair = Pair(
                name=name,
                expected=followed.take(name),
                got=got,
                error=error,
                fragment=whole,
                given=given,
                twin=followed.producers.get(name),
            )
            if error or _comparable(pair, sliced):
                yield pair
                own[name] = _Own(pair.expected if forced else got, given={name: pair.expected})
        if error is not None:
            if not any(name in followed for name in names):
                yield Pair(name=names[0], expected=None, got=None, error=error, fragment=whole, given=given, twin=None)
            return
        for name in (*fragment.reads, *names):
            readers[name] -= name in fragment.reads
            if readers[name] <= 0:
                own.pop(name, None)


class _Reference:
    """The values of the reference, computed on demand and dropped after the last use."""

    def __init__(self, model: ir.Model, feeds: Values, wanted: set[str]) -> None:
        self.producers = {out.name: node for node in model.graph for out in node.outputs if out.name}
        self._model = model
        self._nodes = iter(model.graph)
        self._values = _inputs(model, feeds)
        self._readers = Counter(name for node in model.graph for name in Fragment(model, (node,)).reads)
        self._readers.update(self.producers.keys() & wanted)
        self._constants = model.graph.initializers

    def __contains__(self, name: str) -> bool:
        return name in self.producers or name in self._constants

    def take(self, name: str) -> Any:
        """The value `name`, which can be taken only once."""
        if name not in self.producers:
            tensor = self._constants[name].const_value
            assert tensor is not None
            return read_tensor(tensor)
        while name not in self._values:
            self._step(next(self._nodes))
        value = self._values[name]
        self._release(name)
        return value

    def _step(self, node: ir.Node) -> None:
        fragment = Fragment(self._model, (node,))
        names = [out.name for out in node.outputs if out.name]
        results, error = _attempt(fragment, {n: self._values[n] for n in fragment.reads if n in self._values}, names)
        if error is not None:
            raise CpcompileError(f"the reference cannot be run at its node {node.name} ({node.op_type}): {error}")
        self._values.update((n, v) for n, v in zip(names, results, strict=True) if self._readers[n])
        for name in fragment.reads:
            self._release(name)

    def _release(self, name: str) -> None:
        self._readers[name] -= 1
        if self._readers[name] <= 0:
            self._values.pop(name, None)


def _attempt(fragment: Fragment, given: Values, names: list[str]) -> tuple[list[Any], str | None]:
    """The values, or the first line of what ONNX Runtime said; its errors have no common class."""
    try:
        return fragment.run(given, names), None
    except Exception as error:
        return [None] * len(names), (str(error).strip() or type(error).__name__).splitlines()[0]


def _names(model: ir.Model) -> Iterator[str | None]:
    yield from model.graph.initializers
    yield from (out.name for node in model.graph for out in node.outputs)


def _inputs(model: ir.Model, feeds: Values) -> dict[str, Any]:
    full = complete(feeds, input_shapes(model.graph))
    for value in model.graph.inputs:
        if value.name not in full and value.const_value is None:
            raise UsageError(f"the graph has the input {value.name!r}, of which there is no value; give it too")
    return {value.name: full[value.name] for value in model.graph.inputs if value.name in full}


def _comparable(pair: Pair, sliced: bool) -> bool:
    """Lists of arrays are internal to a graph: the values computed from them are compared."""
    if not isinstance(pair.expected, np.ndarray) or not isinstance(pair.got, np.ndarray):
        return False
    return not sliced or pair.expected.shape == pair.got.shape


def _in_order(nodes: list[ir.Node]) -> tuple[ir.Node, ...]:
    """Each node once, in the order in which they ran."""
    return tuple(dict.fromkeys(nodes))
