"""Copies of constants that several operators share, one per use.

A vector of scales that two branches share would couple the channels of both. While channels are eliminated,
every use therefore has its own copy; afterwards, copies that are still equal are merged again. This concerns only
vectors: a matrix is a parameter, and stored once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.shape_inputs import unique_name

Copies = list[list[ir.Value]]
"""Groups of initializers with the same content; the first of each is the original."""
Axes = tuple[npt.NDArray[np.intp] | None, ...]
"""Per axis the channels that are kept; None where the axis is whole."""


def separate_constants(graphs: Sequence[ir.Graph]) -> Copies:
    """Give every use of a constant vector its own initializer."""
    groups = []
    for graph in graphs:
        for value in list(graph.initializers.values()):
            uses = list(value.uses())
            if len(uses) < 2 or not _is_vector(value):
                continue
            group = [value]
            for node, index in uses[1:]:
                name = unique_name(graph, value.name or "")
                copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
                graph.register_initializer(copy)
                node.replace_input_with(index, copy)
                group.append(copy)
            groups.append(group)
    return groups


def merge_copies(copies: Copies, kept: Mapping[ir.Value, Axes]) -> None:
    """Merge the copies that lost the same channels."""
    for group in copies:
        left: list[ir.Value] = []
        for value in group:
            graph = value.graph
            if not value.is_initializer() or not isinstance(graph, ir.Graph):
                continue
            twin = next((other for other in left if _same_kept(kept.get(other), kept.get(value))), None)
            if twin is None:
                left.append(value)
            else:
                ir.convenience.replace_all_uses_with(value, twin)
                graph.initializers.pop(value.name or "")
        if left and left[0] is not group[0] and isinstance(graph := left[0].graph, ir.Graph):
            # The original is gone: the first copy that is left takes its name.
            graph.initializers.pop(left[0].name or "")
            left[0].name = group[0].name
            graph.register_initializer(left[0])


def _is_vector(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or value.is_graph_input() or value.is_graph_output() or not tensor.dtype.is_floating_point():
        return False
    return sum(length > 1 for length in tensor.shape.numpy()) == 1


def _same_kept(first: Axes | None, second: Axes | None) -> bool:
    if first is None or second is None:
        return first is second
    return all(
        a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in zip(first, second, strict=True)
    )
