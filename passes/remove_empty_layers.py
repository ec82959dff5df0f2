"""Remove layers in which nothing is left: what they add is zero, whatever the inputs are.

    x + 0 -> x      x - 0 -> x      0 - x -> -x      Sum(x, 0, y) -> Sum(x, y)      0 W + b -> b
    f(...) = 0 -> a constant        where the shape of a zero is known and something else needs it (Concat, Where, ...)

A sum keeps its shape, or all its readers broadcast it to that shape: r + (0 + b) * c -> r + b * c.

What only the removed term needed (a norm, projections, their parameters) goes with it, as does x * 1. The rules of
the channels (`channel_rules`) say what is zero. Exact for finite values, but for the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cpcompile.passes.axes import Shape, broadcast
from cpcompile.passes.channel_rules.fixpoint import find_zeros
from cpcompile.passes.channel_rules.products import product_is_zero
from cpcompile.passes.channels import Channels
from cpcompile.passes.clean_up import SMALL, CleanUp, replace_value
from cpcompile.passes.nodes import post_order
from cpcompile.passes.operators import ELEMENTWISE, NOT_ZERO_AT_ZERO, ZERO_AT_ZERO, is_standard
from cpcompile.passes.opset import MinOpsetPass
from cpcompile.passes.shape_inputs import unique_name

SUMS = ("Add", "Sub", "Sum")
STRETCHING = frozenset((*ELEMENTWISE, *ZERO_AT_ZERO, *NOT_ZERO_AT_ZERO)) - {"PRelu"}
"""Operators that broadcast all operands to one shape; PRelu broadcasts only the slope."""


@dataclass
class EmptyLayers(ir.passes.PassResult):
    """`sums`: the results of the sums that lost a term, `zeros`: the values that became a constant."""

    sums: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()


@dataclass(frozen=True)
class RemoveEmptyLayers(MinOpsetPass):
    """Remove terms that are zero, and what they were computed with, until none is left."""

    clean_up: CleanUp = field(default_factory=CleanUp)

    def call(self, model: ir.Model) -> EmptyLayers:
        """Edit `model`; `modified` counts removed terms, new constants and what was cleaned up."""
        graph = model.graph
        sums: list[str] = []
        modified = self.clean_up(model).modified
        while lost := remove_zero_terms(graph, find_zeros(graph)):
            sums += lost
            self.clean_up(model)
        if zeros := _make_constants(graph):
            self.clean_up(model)
        return EmptyLayers(model, bool(modified or sums or zeros), tuple(sums), tuple(zeros))


def remove_zero_terms(graph: ir.Graph, channels: Channels) -> list[str]:
    """Take zero terms from sums where the other terms say the shape; returns the names of their results.

    channels: the result of `find_zeros` for `graph`; it is out of date once a term is removed.
    """
    sums = [(node.outputs[0].name or "", node) for node in post_order(graph) if node.op_type in (*SUMS, "Gemm")]
    return [name for name, node in sums if is_standard(node) and _loses_terms(channels, node)]


def _loses_terms(channels: Channels, node: ir.Node) -> bool:
    terms, zeros = _terms(channels, node)
    kept, shapes = list(terms), {}
    for value in reversed(zeros):
        left = [other for other in kept if other is not value]
        if left and (narrowed := _shapes_with(channels, node.outputs[0], left)) is not None:
            kept, shapes = left, narrowed
    if len(kept) == len(terms):
        return False
    for value, shape in shapes.items():
        channels.narrow(value, shape)
    if node.op_type == "Sub" and kept == terms[1:]:
        _replace(node, ir.node("Neg", kept, name=node.name))
    elif len(kept) > 1:
        _replace(node, ir.node("Sum", kept, name=node.name))
    elif kept[0] is not None and replace_value(kept[0], node.outputs[0]):
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    else:
        # What the model takes in or stores cannot itself be its output.
        _replace(node, ir.node("Identity", kept, name=node.name))
    return True


def _terms(channels: Channels, node: ir.Node) -> tuple[list[ir.Value | None], list[ir.Value | None]]:
    """The terms that `node` adds up, and those that are zero; None stands for the product of a Gemm."""
    if node.op_type != "Gemm":
        terms = [value for value in node.inputs if value is not None]
        return [*terms], [value for value in terms if _is_zero(channels, value)]
    bias, beta = node.inputs[2] if len(node.inputs) > 2 else None, node.attributes.get("beta")
    whole = bias is not None and (beta is None or beta.as_float() == 1)
    return [bias, None], [None] if whole and product_is_zero(channels, node) else []


def _shapes_with(channels: Channels, out: ir.Value, terms: Sequence[ir.Value | None]) -> dict[ir.Value, Shape] | None:
    """The shapes that change, from the sum `out` on, if it adds up only `terms`.

    None if something needs the shape that it has.
    """
    given = broadcast([channels.shape(value) for value in terms])
    return None if given is None or channels.shape(out) is None else _narrowed(channels, out, given, {})


def _narrowed(
    channels: Channels, value: ir.Value, shape: Shape, known: dict[ir.Value, Shape]
) -> dict[ir.Value, Shape] | None:
    """`known` and the shapes that change if `value` has this `shape`; None if something needs the one that it has."""
    if shape == known.get(value, channels.shape(value)):
        return known
    if value.is_graph_output():
        return None
    found: dict[ir.Value, Shape] | None = {**known, value: shape}
    for node, _ in value.uses():
        if found is None or not is_standard(node) or node.op_type not in STRETCHING:
            return None
        operands = [operand for operand in node.inputs if operand is not None]
        made = broadcast([found.get(operand, channels.shape(operand)) for operand in operands])
        found = None if made is None else _narrowed(channels, node.outputs[0], made, found)
    return found


def _is_zero(channels: Channels, value: ir.Value) -> bool:
    return channels.shape(value) is not None and channels.zero(value).everything


def _replace(node: ir.Node, other: ir.Node) -> None:
    """Replace `node` by `other`, whose result takes over the name."""
    graph, old, new = node.graph, node.outputs[0], other.outputs[0]
    assert graph is not None
    graph.insert_before(node, other)
    name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    old.name, new.name = f"{name}.replaced", name


def _make_constants(graph: ir.Graph) -> list[str]:
    """Make zeros of known shape constants; returns their names, without values that only led to them."""
    channels = find_zeros(graph)
    made = []
    for node in reversed(list(post_order(graph))):
        for out in node.outputs:
            shape = out.shape.numpy() if out.shape is not None and out.shape.is_static() else None
            if shape is None or out.dtype is None or not out.uses() or out.is_graph_output():
                continue
            small = np.prod(shape, dtype=np.int64) <= SMALL
            if not small or not out.dtype.is_floating_point() or not _is_zero(channels, out):
                continue
            name = unique_name(graph, f"{out.name}.zero")
            tensor = ir.tensor(np.zeros(shape, dtype=out.dtype.numpy()), dtype=out.dtype, name=name)
            constant = ir.Value(name=name, shape=ir.Shape(shape), type=out.type, const_value=tensor)
            graph.register_initializer(constant)
            ir.convenience.replace_all_uses_with(out, constant)
            made.append(out.name or "")
        if made and not any(out.uses() or out.is_graph_output() for out in node.outputs):
            assert node.graph is not None
            node.graph.remove(node, safe=True)
    return made[::-1]
