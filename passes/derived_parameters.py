"""Parameters in the form that an engine reads fastest, in place of those that a graph was captured with.

The new initializers are made of whole parameters. Along with each comes what the context keeps of it, so that
`share_weights` stores what contexts share once, as it does for the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.core.rounding import Calibrated
from cpcompile.passes.nodes import constant_of, int_attribute, permutation
from cpcompile.passes.operators import is_standard
from cpcompile.passes.share_weights import KeptChannels, Whole

Axes = tuple[npt.NDArray[np.intp] | None, ...]
"""Per axis the kept indices; None where the axis is whole."""


@dataclass(frozen=True)
class Derived:
    """An initializer that is made of a parameter, and what of it the context keeps."""

    kept: Axes
    whole: Whole


@dataclass
class Derivation(ir.passes.PassResult):
    """`parameters`: the new initializers by name."""

    parameters: Mapping[str, Derived] = field(default_factory=dict)


@dataclass(frozen=True)
class Lookup:
    """`node` looks rows of a table up; they come out of `last`. columns: the table lies as a product reads it."""

    node: ir.Node
    last: ir.Node
    columns: bool


class DerivedParameters:
    """The parameters of one graph, and those that replace them.

    kept: parameter -> per axis the channels that the graph has of it. whole: the parameters of all contexts, with
    their axes as in the graph.
    """

    def __init__(self, graph: ir.Graph, kept: KeptChannels, whole: Mapping[str, Whole]) -> None:
        self._graph = graph
        self._kept = kept
        self._whole = whole
        self.replaced: dict[str, None] = {}
        """Names of parameters in whose place others are read."""
        self.derived: dict[str, Derived] = {}

    def products(self) -> Iterator[tuple[ir.Node, str]]:
        """Every MatMul with a parameter (inputs, outputs), and its name."""
        for node in list(self._graph):
            if node.op_type == "MatMul" and is_standard(node) and (name := self._name_of(node.inputs[1])) is not None:
                yield node, name

    def lookups(self) -> Iterator[tuple[Lookup, str]]:
        """Every Gather of token embeddings from a parameter, and its name."""
        for node in list(self._graph):
            if node.op_type != "Gather" or not is_standard(node) or node.inputs[1] is None:
                continue
            name = self._name_of(node.inputs[0])
            if name is None or constant_of(node.inputs[1]) is not None:
                continue
            if int_attribute(node, "axis", 0) == 0:
                yield Lookup(node, node, columns=False), name
            elif (last := _brings_last(node)) is not None:
                yield Lookup(node, last, columns=True), name

    def kept(self, name: str) -> Axes:
        """What the graph has of the parameter `name`."""
        return self._kept[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole parameter `name`, with its axes as in the graph."""
        return self._whole[name].shape

    def read(self, name: str) -> npt.NDArray[np.generic]:
        """The elements of the whole parameter `name`."""
        return self._whole[name].read()

    def calibrated(self, name: str) -> Calibrated:
        """What the parameter `name` is rounded to, where that is known."""
        return self._whole[name].calibrated

    def add(self, name: str, kept: Axes, dtype: ir.DataType, whole: Whole) -> ir.Value:
        """The initializer `name` with what is `kept` of `whole`, made when it is read."""
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        own = ir.Shape([size if axis is None else len(axis) for size, axis in zip(whole.shape, kept, strict=True)])

        def make() -> ir.TensorProtocol:
            array = whole.read()
            for axis, indices in enumerate(kept):
                if indices is not None:
                    array = np.take(array, indices, axis=axis)
            return ir.tensor(np.ascontiguousarray(array), name=name)

        tensor = ir.LazyTensor(make, dtype=dtype, shape=own, name=name)
        value = ir.Value(name=name, shape=own, type=ir.TensorType(dtype), const_value=tensor)
        self._graph.register_initializer(value)
        self.derived[name] = Derived(kept, whole)
        return value

    def replace(self, last: ir.Node, nodes: list[ir.Node], parameter: str, *, first: ir.Node | None = None) -> None:
        """Let the last of `nodes` give what the node `last` gave, from what is derived of `parameter`."""
        out, new = last.outputs[0], nodes[-1].outputs[0]
        new.type, new.shape = out.type, out.shape
        for node in nodes:
            node.metadata_props.update(last.metadata_props)
        self._graph.insert_before(last, nodes)
        name = out.name
        ir.convenience.replace_all_uses_with(out, new, replace_graph_outputs=True)
        self._graph.remove(last, safe=True)
        if first is not None and first is not last:
            self._graph.remove(first, safe=True)
        new.name = name
        self.replaced[parameter] = None

    def drop_unread(self) -> None:
        """Remove the parameters that nothing reads any more."""
        for name in self.replaced:
            value = self._graph.initializers[name]
            if not value.uses() and not value.is_graph_output():
                self._graph.initializers.pop(name)

    def _name_of(self, value: ir.Value | None) -> str | None:
        """The name of a parameter with two axes."""
        tensor = None if value is None else constant_of(value)
        if value is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
            return None
        return value.name if value.name in self._kept else None


def _brings_last(node: ir.Node) -> ir.Node | None:
    """The Transpose that brings the channels of looked-up columns to the end, if it alone reads them."""
    readers = [reader for reader, _ in node.outputs[0].uses()]
    shape = node.outputs[0].shape
    if len(readers) != 1 or readers[0].op_type != "Transpose" or shape is None or node.outputs[0].is_graph_output():
        return None
    rank = shape.rank()
    return readers[0] if permutation(readers[0], rank) == [*range(1, rank), 0] else None
