"""Remove the cache of a language model: every pass reads a whole text, and gives all logits.

present = Concat(past, new)  ->  new        the inputs of the past and the outputs of the present are gone
attention_mask               ->  ones       position_ids -> 0, 1, 2, …       logits_to_keep -> 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpcompile.core.cache import INPUT, KEEP, MASK, POSITIONS, PRESENT
from cpcompile.core.errors import CpcompileError
from cpcompile.passes.bind_context import BindContext
from cpcompile.passes.cache_interface import caches
from cpcompile.passes.canonicalize_shapes import CanonicalizeShapes
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.fold_constants import FoldConstants
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import add_constant, integer_node


@dataclass(frozen=True)
class RemoveCache(GraphPass):
    """Make the graph one of whole texts; a graph without a cache stays as it is."""

    def may_remove(self, output: str) -> bool:
        return PRESENT.fullmatch(output) is not None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; CpcompileError if something else than a Concat reads the cache."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        if KEEP not in inputs:
            return ir.passes.PassResult(model, False)
        for past, present in caches(graph).items():
            graph.outputs.remove(present)
            joined = present.producer()
            if joined is None or joined.op_type != "Concat" or {node for node, _ in past.uses()} != {joined}:
                raise CpcompileError(f"the cache {past.name!r} is read by something else than one Concat; keep it")
            (new,) = (value for value in joined.inputs if value is not past and value is not None)
            ir.convenience.replace_all_uses_with(present, new)
            graph.remove(joined, safe=True)
            graph.inputs.remove(past)
        _bind_texts(graph, inputs)
        return ir.passes.PassResult(model, True)


def without_cache(frozen: ir.Model) -> ir.Model:
    """A copy of a frozen graph that reads whole texts, for engines that have no cache; tensors are shared."""
    return _folded(frozen, RemoveCache())


def with_all_logits(frozen: ir.Model) -> ir.Model:
    """A copy of a frozen graph without the input `logits_to_keep`, which keeps its cache; tensors are shared."""
    return _folded(frozen, BindContext(0, KEEP))


def _folded(frozen: ir.Model, change: ir.passes.InPlacePass) -> ir.Model:
    """A copy after `change`, with what became constant folded."""
    model, clean_up = frozen.clone(), CleanUp(frozenset(frozen.graph.initializers))
    if change(model).modified:
        for each in (FoldConstants(), clean_up, CanonicalizeShapes(), clean_up):
            each(model)
    return model


def _bind_texts(graph: ir.Graph, inputs: Mapping[str | None, ir.Value]) -> None:
    """Compute from the tokens alone where they stand."""
    constants = {"ones": np.ones(1), "axis": np.array(1), "first": np.array(0), "each": np.array(1)}
    known = {name: add_constant(graph, f"text.{name}", array.astype(np.int64)) for name, array in constants.items()}
    shape = integer_node("Shape", [inputs[INPUT]], "text.shape")
    length = integer_node("Gather", [shape.outputs[0], known["axis"]], "text.length")
    numbers = integer_node("Range", [known["first"], length.outputs[0], known["each"]], "text.numbers")
    positions = integer_node("Expand", [numbers.outputs[0], shape.outputs[0]], "text.positions")
    mask = integer_node("Expand", [known["ones"], shape.outputs[0]], "text.mask")
    graph.insert_before(graph[0], (shape, length, numbers, positions, mask))
    for name, value in {MASK: mask.outputs[0], POSITIONS: positions.outputs[0], KEEP: known["first"]}.items():
        if (given := inputs.get(name)) is not None:
            value.type, value.shape = given.type, inputs[INPUT].shape if name != KEEP else given.shape
            ir.convenience.replace_all_uses_with(given, value)
            graph.inputs.remove(given)
