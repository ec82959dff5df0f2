"""The cache of a language model in its graph: inputs of the past and outputs of the present, by name (`core.cache`).

Callers read its shapes from the graph, so a context may have fewer heads in it, and none where a layer has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import onnx_ir as ir

from cpcompile.core.cache import present_of

FLOAT = ir.DataType.FLOAT


def caches(graph: ir.Graph) -> Mapping[ir.Value, ir.Value]:
    """Input of the past -> output of the present."""
    outputs = {value.name: value for value in graph.outputs}
    named = ((value, present_of(value.name or "")) for value in graph.inputs)
    return {value: outputs[present] for value, present in named if present in outputs}


def bytes_per_token(graph: ir.Graph) -> int:
    """What the cache grows by with every token of a sequence; 0 without a cache."""
    channels = {value: prod(axis for axis in value.shape or () if isinstance(axis, int)) for value in caches(graph)}
    return sum(number * int((value.dtype or FLOAT).itemsize) for value, number in channels.items())


def input_shapes(graph: ir.Graph) -> dict[str, list[int | str | None]]:
    """Input -> its axes: numbers, or names, or None."""
    return {
        value.name or "": [axis if isinstance(axis, int) else axis.value for axis in value.shape or ()]
        for value in graph.inputs
    }


def remove_idle_caches(model: ir.Model, clean_up: ir.passes.InPlacePass) -> None:
    """Remove the pairs that nothing reads but the next call, and with `clean_up` what only they needed."""
    graph = model.graph
    for past, present in caches(graph).items():
        if not present.uses() and {node for node, _ in past.uses()} <= {present.producer()}:
            graph.outputs.remove(present)
    clean_up(model)
    left = set(caches(graph))
    for value in [each for each in graph.inputs if present_of(each.name or "") and each not in left]:
        if not value.uses():
            graph.inputs.remove(value)
