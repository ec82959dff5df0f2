"""If, Loop and Scan: their bodies are part of the graph, and channels go through the borders.

    If      output i = output i of either branch
    Loop    inputs (trip count, condition, states), body (iteration, condition, states) -> (condition, states, scans)
    Scan    inputs (states, scanned), body (states, elements) -> (states, elements)

What runs along with each other (a state before, in and after an iteration) is one strand; scanned values have
an axis more, along which the iterations are stacked. Values that a body reads from outside need no rule:
they are the same values there. A body of any other operator keeps its inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.rule import Rule, value_of
from cpcompile.passes.channels import Cell, Channels, Zeros
from cpcompile.passes.symbolic_shapes import bodies_of, is_standard, nodes_inside_out, number_of

Member = tuple[ir.Value, int | None]
"""A value, and the axis along which iterations are stacked."""


@dataclass(frozen=True)
class Strand:
    """Values that run along with each other: what leaves the node and what enters its body is one of the sources."""

    out: Member | None
    inside: Member | None
    sources: tuple[Member, ...]

    @property
    def members(self) -> list[Member]:
        return [member for member in (self.out, self.inside, *self.sources) if member is not None]


def owners(graph: ir.Graph) -> dict[ir.Value, ir.Node]:
    """Inputs and outputs of all bodies -> the node that the body belongs to."""
    return {
        value: node
        for node in nodes_inside_out(graph)
        for body in bodies_of(node)
        for value in (*body.inputs, *body.outputs)
    }


def strands_of(channels: Channels, node: ir.Node) -> list[Strand]:
    """What runs along with each other: one strand per output, in their order, then those of scanned inputs."""
    if not is_standard(node) or node.op_type not in RULES:
        return []
    bodies = bodies_of(node)
    if node.op_type == "If":
        branches = zip(*(body.outputs for body in bodies), strict=True)
        pairs = zip(node.outputs, branches, strict=True)
        return [Strand((out, None), None, tuple((value, None) for value in values)) for out, values in pairs]
    (body,) = bodies
    loops = node.op_type == "Loop"
    first, scanned = (2, 0) if loops else (0, number_of(node, "num_scan_inputs", 0))
    states = len(node.inputs) - first - scanned
    strands = []
    for at in range(states):
        before, after = (value_of(node, first + at), None), (body.outputs[at + loops], None)
        strands.append(Strand((node.outputs[at], None), (body.inputs[first + at], None), (before, after)))
    made, parts = node.outputs[states:], body.outputs[states + loops :]
    for out, part, axis in zip(made, parts, _axes(channels, node, "scan_output_axes", made), strict=True):
        strands.append(Strand((out, axis), None, ((part, None),)))
    read, parts = node.inputs[first + states :], body.inputs[first + states :]
    for value, part, axis in zip(read, parts, _axes(channels, node, "scan_input_axes", read), strict=True):
        if value is not None:
            strands.append(Strand(None, (part, None), ((value, axis),)))
    return strands


def _axes(channels: Channels, node: ir.Node, name: str, values: Sequence[ir.Value | None]) -> list[int]:
    attribute = node.attributes.get(name)
    axes = attribute.as_ints() if attribute is not None else [0] * len(values)
    return [axis % len(channels.shape(v) or (0,)) for axis, v in zip(axes, values, strict=True)]


def _agree(channels: Channels, node: ir.Node) -> None:
    settings = list(node.inputs[: {"If": 1, "Loop": 2}.get(node.op_type, 0)])
    for body in bodies_of(node) if node.op_type == "Loop" else ():
        settings += [*body.inputs[:2], *body.outputs[:1]]
    for setting in settings:
        channels.keep(setting, node, "it counts or ends the iterations")
    for strand in strands_of(channels, node):
        cells = _aligned(channels, strand.members)
        for value, stacked in strand.members:
            if cells is None:
                channels.keep(value, node, "shapes do not tell what goes in and out of its body")
            elif stacked is not None:
                channels.keep(value, node, "iterations are stacked along this axis", axes=[stacked])
        for tied in cells or ():
            channels.tie(tied, node)


def _aligned(channels: Channels, members: Sequence[Member]) -> list[list[Cell]] | None:
    """Per axis inside of the body the cells of all members; None if that is not known."""
    columns: list[list[Cell]] = []
    for value, stacked in members:
        shape = channels.shape(value)
        if shape is None:
            return None
        columns.append([(value, axis) for axis in range(len(shape)) if axis != stacked])
    ranks = {len(column) for column in columns}
    return [list(cells) for cells in zip(*columns, strict=True)] if len(ranks) == 1 else None


def common_zeros(channels: Channels, target: Member, sources: Sequence[Member]) -> Zeros | None:
    """What is zero of `target`, which is always one of the `sources`."""
    shape, cells = channels.shape(target[0]), _aligned(channels, [target, *sources])
    if shape is None or cells is None:
        return None
    masks = list(Zeros.none(shape).axes)
    for (_, axis), *others in cells:
        known = [channels.zero(value).axes[own] for value, own in others]
        if all(mask.size == masks[axis].size for mask in known):
            masks[axis] = np.logical_and.reduce(known)
    return Zeros.of(masks, everything=all(channels.zero(value).everything for value, _ in sources))


def _zeros(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    """Zero is what either branch makes zero, and what is zero before the first and after each iteration."""
    found = [common_zeros(channels, strand.out, strand.sources) for strand in strands_of(channels, node) if strand.out]
    return [zeros or Zeros.none(channels.shape(out) or ()) for out, zeros in zip(node.outputs, found, strict=True)]


RULES: Mapping[str, Rule] = MappingProxyType(
    dict.fromkeys(("If", "Loop", "Scan"), Rule(_agree, _zeros, data=2**10)),
)
