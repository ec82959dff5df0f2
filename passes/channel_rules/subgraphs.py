"""If, Loop and Scan: their subgraphs are part of the graph, and channels go through their inputs and outputs.

    If      output i = output i of either branch
    Loop    inputs (trip count, condition, states), body (iteration, condition, states) -> (condition, states, scans)
    Scan    inputs (states, scanned), body (states, elements) -> (states, elements)

A loop-carried state is the same tensor before, in and after an iteration, so its channels are coupled; scanned values
have one more axis, along which the iterations are stacked. Values that a subgraph reads from outside need no rule:
they are the same values there. A subgraph of any other operator keeps its inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.rule import Rule, value_of
from cpcompile.passes.channels import Cell, Channels, Zeros
from cpcompile.passes.nodes import int_attribute, post_order, subgraphs_of
from cpcompile.passes.operators import is_standard

Member = tuple[ir.Value, int | None]
"""A value, and the axis along which iterations are stacked."""


@dataclass(frozen=True)
class LoopCarried:
    """Values with the same channels: what leaves the node (`out`) and what enters its body is one of the `sources`."""

    out: Member | None
    inside: Member | None
    sources: tuple[Member, ...]

    @property
    def members(self) -> list[Member]:
        return [member for member in (self.out, self.inside, *self.sources) if member is not None]


def owners(graph: ir.Graph) -> dict[ir.Value, ir.Node]:
    """Inputs and outputs of all subgraphs -> the node that the subgraph belongs to."""
    return {
        value: node
        for node in post_order(graph)
        for subgraph in subgraphs_of(node)
        for value in (*subgraph.inputs, *subgraph.outputs)
    }


def loop_carried_values(channels: Channels, node: ir.Node) -> list[LoopCarried]:
    """Values with the same channels: one entry per output, in their order, then those of scanned inputs."""
    if not is_standard(node) or node.op_type not in RULES:
        return []
    subgraphs = subgraphs_of(node)
    if node.op_type == "If":
        branches = zip(*(body.outputs for body in subgraphs), strict=True)
        pairs = zip(node.outputs, branches, strict=True)
        return [LoopCarried((out, None), None, tuple((value, None) for value in values)) for out, values in pairs]
    (body,) = subgraphs
    loops = node.op_type == "Loop"
    first, scanned = (2, 0) if loops else (0, int_attribute(node, "num_scan_inputs", 0))
    states = len(node.inputs) - first - scanned
    carried = []
    for at in range(states):
        before, after = (value_of(node, first + at), None), (body.outputs[at + loops], None)
        carried.append(LoopCarried((node.outputs[at], None), (body.inputs[first + at], None), (before, after)))
    made, parts = node.outputs[states:], body.outputs[states + loops :]
    for out, part, axis in zip(made, parts, _axes(channels, node, "scan_output_axes", made), strict=True):
        carried.append(LoopCarried((out, axis), None, ((part, None),)))
    read, parts = node.inputs[first + states :], body.inputs[first + states :]
    for value, part, axis in zip(read, parts, _axes(channels, node, "scan_input_axes", read), strict=True):
        if value is not None:
            carried.append(LoopCarried(None, (part, None), ((value, axis),)))
    return carried


def _axes(channels: Channels, node: ir.Node, name: str, values: Sequence[ir.Value | None]) -> list[int]:
    attribute = node.attributes.get(name)
    axes = attribute.as_ints() if attribute is not None else [0] * len(values)
    return [axis % len(channels.shape(v) or (0,)) for axis, v in zip(axes, values, strict=True)]


def _agree(channels: Channels, node: ir.Node) -> None:
    settings = list(node.inputs[: {"If": 1, "Loop": 2}.get(node.op_type, 0)])
    for body in subgraphs_of(node) if node.op_type == "Loop" else ():
        settings += [*body.inputs[:2], *body.outputs[:1]]
    for setting in settings:
        channels.keep(setting, node, "it counts or ends the iterations")
    for each in loop_carried_values(channels, node):
        cells = _aligned(channels, each.members)
        for value, stacked in each.members:
            if cells is None:
                channels.keep(value, node, "its shapes do not show how values enter and leave its body")
            elif stacked is not None:
                channels.keep(value, node, "iterations are stacked along this axis", axes=[stacked])
        for coupled in cells or ():
            channels.couple(coupled, node)


def _aligned(channels: Channels, members: Sequence[Member]) -> list[list[Cell]] | None:
    """Per axis inside the subgraph the cells of all members; None if they are not known."""
    columns: list[list[Cell]] = []
    for value, stacked in members:
        shape = channels.shape(value)
        if shape is None:
            return None
        columns.append([(value, axis) for axis in range(len(shape)) if axis != stacked])
    ranks = {len(column) for column in columns}
    return [list(cells) for cells in zip(*columns, strict=True)] if len(ranks) == 1 else None


def common_zeros(channels: Channels, target: Member, sources: Sequence[Member]) -> Zeros | None:
    """The zeros of `target`, which is always one of the `sources`."""
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
    """Zero is what both branches make zero, or what is zero before the first and after each iteration."""
    found = [common_zeros(channels, each.out, each.sources) for each in loop_carried_values(channels, node) if each.out]
    return [zeros or Zeros.none(channels.shape(out) or ()) for out, zeros in zip(node.outputs, found, strict=True)]


RULES: Mapping[str, Rule] = MappingProxyType(
    dict.fromkeys(("If", "Loop", "Scan"), Rule(_agree, _zeros, data=2**10)),
)
