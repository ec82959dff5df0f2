"""What a file claims about the results of its nodes, against what their operators make of the inputs.

Old exporters and graph editors leave types and shapes behind that are no longer true. Inference gets a copy without
them, with numbers for the symbolic axes: by its name, an axis twice as long as N cannot be told from N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from cpcompile.passes.nodes import subgraphs_of
from cpcompile.passes.onnx_inference import distinct_lengths, inferred


def drop_wrong_claims(model: ir.Model, complete: Callable[[ir.Model], object]) -> list[str]:
    """Replace all claims by what inference finds if one of them is wrong; returns what was wrong, one text each.

    A file that is wrong once is not believed where nothing can be verified. The names that it gives to the axes of the
    model's outputs stay. `complete` adds what onnx leaves open.
    """
    wrong: set[ir.Value] = set()
    for lengths in (distinct_lengths(model.graph), {}):  # with these numbers, inference may skip nodes that need others
        if (made := inferred(model, believe=False, lengths=lengths)) is not None:
            complete(made)
            wrong.update(own for own, other in _pairs(model, made) if _contradict(own, other, lengths))
    if not wrong or (made := inferred(model, believe=False)) is None:
        return []
    complete(made)
    texts = []
    for own, other in _pairs(model, made):
        if own in wrong:
            texts.append(f"{own.name} is declared as {_described(own)}, its operator makes {_described(other)}")
        if own in wrong or not own.is_graph_output() or own.graph is not model.graph:
            own.type = own.type if other.type is None else other.type
            own.shape = None if other.shape is None else ir.Shape(_dim(d) for d in other.shape)
    for node in model.graph.all_nodes():
        first = 2 if node.op_type == "Loop" else 0  # ONNX Runtime needs to know that its counter is a scalar
        for value in (value for subgraph in subgraphs_of(node) for value in subgraph.inputs[first:]):
            value.shape = None
    return texts


def _pairs(model: ir.Model, other: ir.Model) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The results of all nodes in both models."""
    for graph, twin in zip(model.graphs(), other.graphs(), strict=True):
        named = {out.name: out for node in twin for out in node.outputs}
        yield from ((out, named[out.name]) for node in graph for out in node.outputs if out.name in named)


def _contradict(claim: ir.Value, made: ir.Value, lengths: Mapping[str | None, int]) -> bool:
    """Whether a type, a rank or a length is claimed that is not made."""
    if isinstance(claim.type, ir.TensorType) and isinstance(made.type, ir.TensorType) and claim.dtype != made.dtype:
        return True
    if claim.shape is None or made.shape is None:
        return False
    if claim.shape.rank() != made.shape.rank():
        return True
    claimed = (d if isinstance(d, int) else lengths.get(d.value) if d.value is not None else None for d in claim.shape)
    numbers = (d if isinstance(d, int) and d >= 0 else None for d in made.shape)
    return any(None not in (a, b) and a != b for a, b in zip(claimed, numbers, strict=True))


def _dim(length: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """Inference says -1 for a length that it cannot compute."""
    return ir.SymbolicDim(None) if isinstance(length, int) and length < 0 else length


def _described(value: ir.Value) -> str:
    lengths = ["?" if str(length).startswith("unk__") else str(length) for length in value.shape or ()]
    return str(value.type) if value.shape is None else f"{value.type}[{','.join(lengths)}]"
