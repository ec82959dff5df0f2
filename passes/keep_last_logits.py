"""Give the logits of the last token of each text alone, for runtimes that do not know the input `logits_to_keep`.

hidden[:, -keep:]  ->  hidden[row, last[row]]     last: where attention_mask ends, among the tokens of this call

A batch of texts of different lengths may be filled up on either side: ONNX Runtime GenAI does it on the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpcompile.core.cache import INPUT, KEEP, MASK, OUTPUT
from cpcompile.core.errors import CpcompileError
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import add_constant, integer_node

STARTS = 1
"""The input of a Slice that says where it begins."""


@dataclass(frozen=True)
class KeepLastLogits(GraphPass):
    """Replace the input `logits_to_keep` by one position per text; a graph without it stays as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; CpcompileError if it is not one Slice that keeps the positions."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        if (keep := inputs.get(KEEP)) is None:
            return ir.passes.PassResult(model, False)
        kept = _slice_of(keep)
        if MASK not in inputs:
            raise CpcompileError(f"the graph has no input {MASK!r}, which says where texts end; it cannot be exported")
        hidden = kept.inputs[0]
        assert hidden is not None
        nodes = _last_tokens(graph, inputs[INPUT], inputs[MASK], hidden, kept.outputs[0])
        graph.insert_before(kept, nodes)
        ir.convenience.replace_all_uses_with(kept.outputs[0], nodes[-1].outputs[0])
        (logits,) = (value for value in graph.outputs if value.name == OUTPUT)
        assert logits.shape is not None
        logits.shape = ir.Shape([logits.shape[0], 1, *logits.shape[2:]])
        CleanUp(frozenset(graph.initializers))(model)
        graph.inputs.remove(keep)
        return ir.passes.PassResult(model, True)


def _slice_of(keep: ir.Value) -> ir.Node:
    """The Slice whose start is computed from `keep`."""
    found, waiting, seen = [], [keep], set()
    while waiting:
        for node, index in waiting.pop().uses():
            if node.op_type == "Slice" and index == STARTS:
                found.append(node)
            elif node not in seen:
                seen.add(node)
                waiting += node.outputs
    if len(found) != 1 or OUTPUT in {value.name for node in seen for value in node.outputs}:
        raise CpcompileError(f"{len(found)} nodes slice by the input {keep.name!r}, and exactly one should")
    return found[0]


def _last_tokens(
    graph: ir.Graph, ids: ir.Value, mask: ir.Value, hidden: ir.Value, like: ir.Value
) -> tuple[ir.Node, ...]:
    """Nodes whose last one gives `hidden` (batch, sequence, channels) at the last token of each row."""
    constants = {"axis": [1], "end": [np.iinfo(np.int64).max], "row": [2]}
    known = {name: add_constant(graph, f"last.{name}", np.array(value)) for name, value in constants.items()}
    length = integer_node("Shape", [ids], "last.length", start=1, end=2)
    first = integer_node("Neg", [length.outputs[0]], "last.first")
    own = integer_node("Slice", [mask, first.outputs[0], known["end"], known["axis"]], "last.mask")
    last = integer_node("ArgMax", [own.outputs[0]], "last.index", axis=1, keepdims=1, select_last_index=1)
    index = integer_node("Unsqueeze", [last.outputs[0], known["row"]], "last.indices")
    rows = integer_node("GatherND", [hidden, index.outputs[0]], "last.hidden", batch_dims=1)
    rows.outputs[0].type, rows.outputs[0].shape = hidden.type, like.shape
    return length, first, own, last, index, rows
