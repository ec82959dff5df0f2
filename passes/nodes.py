"""What passes ask about nodes and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.operators import is_standard


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a constant; None for an initializer that is also an input, because a caller may replace it."""
    return None if value.is_graph_input() else value.const_value


def made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that computes `value`, if it is one of these operators of the standard."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in operators and is_standard(node) else None


def both_orders(node: ir.Node) -> tuple[tuple[ir.Value, ir.Value], ...]:
    """The two operands of a Mul, an Add or the like, and the same the other way round."""
    first, second = node.inputs
    assert first is not None and second is not None
    return (first, second), (second, first)


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def constant_integer(value: ir.Value | None) -> int | None:
    """The whole number that is the one element of a constant."""
    tensor = None if value is None else constant_of(value)
    return int(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def known_shape(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    """Lengths and their names; () if one is unknown."""
    return () if value.shape is None or value.shape.has_unknown_dim() else tuple(value.shape)


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def permutation(node: ir.Node, rank: int) -> list[int]:
    """The axes of a Transpose."""
    attribute = node.attributes.get("perm")
    return list(attribute.as_ints()) if attribute is not None else list(range(rank))[::-1]


def subgraphs_of(node: ir.Node) -> list[ir.Graph]:
    """The sub-graphs of `node`."""
    subgraphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            subgraphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            subgraphs += attribute.as_graphs()
    return subgraphs


def post_order(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes in post-order: those of subgraphs before the node that has the subgraphs."""
    for node in graph:
        for subgraph in subgraphs_of(node):
            yield from post_order(subgraph)
        yield node


def integer_node(operator: str, inputs: Sequence[ir.Value | None], name: str, **attributes: int) -> ir.Node:
    """A node, and its one result of int64, under `name`."""
    node = ir.node(operator, inputs, attributes, name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.INT64)
    return node


def add_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A new initializer of `graph`, under another name if that is taken."""
    inputs = {value.name for value in graph.inputs}
    while name in graph.initializers or name in inputs:
        name += "_"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
