"""What a file claims about the results of its nodes, against what their operators make of the inputs.

Old exporters and graph editors leave types and shapes behind that are no longer true. Inference gets a copy without
them, with numbers for the symbolic axes: by its name, an axis twice as long as N cannot be told from N. Where it
finds nothing, as behind a loop, each claim is compared with what follows from the claims before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from cpcompile.passes.nodes import subgraphs_of
from cpcompile.passes.onnx_inference import distinct_lengths, inferred


@dataclass(frozen=True)
class Verified:
    """`made`: the model with what inference finds without its claims."""

    made: ir.Model | None
    wrong: tuple[str, ...] = ()
    """What was claimed wrongly, one text for each value."""
    more: bool = False
    """Whether claims are left that inference cannot make itself."""


def drop_wrong_claims(model: ir.Model, complete: Callable[[ir.Model], object]) -> Verified:
    """Replace all claims by what inference finds if one of them is wrong.

    A file that is wrong once is not believed where nothing can be verified. The names that it gives to the axes of the
    model's outputs stay. `complete` adds what onnx leaves open.
    """
    if (made := inferred(model, believe=False)) is None:
        return Verified(None, more=True)
    complete(made)
    pairs = list(_pairs(model, made))
    wrong = {own: other for own, other in pairs if _contradict(own, other, {})}
    lengths = distinct_lengths(model.graph)  # with these numbers, inference may skip nodes that need others
    numbered = inferred(model, believe=False, lengths=lengths) if lengths else None
    if numbered is not None:
        complete(numbered)
        wrong.update((own, other) for own, other in _pairs(model, numbered) if _contradict(own, other, lengths))
    more = any(_says_more(own, other) for own, other in pairs)
    if not wrong and more:
        wrong.update(_against_each_other(model))
    if not wrong:
        return Verified(made, more=more)
    texts = []
    for own, other in pairs:
        if own in wrong:
            makes = _described(other if other.shape is not None else wrong[own])
            texts.append(f"{own.name} is declared as {_described(own)}, its operator makes {makes}")
        if own in wrong or not own.is_graph_output() or own.graph is not model.graph:
            own.type = own.type if other.type is None else other.type
            if other.shape is not None:
                own.shape = ir.Shape(_dim(d) for d in other.shape)
            elif own.shape is not None:  # an output of the model must have a shape, if one without lengths
                own.shape = ir.Shape([None] * own.shape.rank()) if own.is_graph_output() else None
    for node in model.graph.all_nodes():
        first = 2 if node.op_type == "Loop" else 0  # ONNX Runtime needs to know that its counter is a scalar
        for value in (value for subgraph in subgraphs_of(node) for value in subgraph.inputs[first:]):
            value.shape = None
    return Verified(made, tuple(texts))


def _pairs(model: ir.Model, other: ir.Model) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The results of all nodes in both models."""
    for graph, twin in zip(model.graphs(), other.graphs(), strict=True):
        named = {out.name: out for node in twin for out in node.outputs}
        yield from ((out, named[out.name]) for node in graph for out in node.outputs if out.name in named)


def _against_each_other(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Claims that do not follow from those before them, with what does.

    The readers of a claimed result get it from an input of the model instead, so that inference believes the claim
    there, and still says what the operator makes.
    """
    apart = model.clone()
    claimed = [out for node in apart.graph for out in node.outputs if out.name and out.shape is not None]
    for made in claimed:
        believed = ir.Value(name=made.name, type=made.type, shape=made.shape)
        ir.convenience.replace_all_uses_with(made, believed, replace_graph_outputs=True)
        apart.graph.inputs.append(believed)
        made.name, made.type, made.shape = f"{made.name}.made", None, None
    found = inferred(apart)
    results = {} if found is None else {out.name: out for node in found.graph for out in node.outputs}
    for own in (out for node in model.graph for out in node.outputs):
        other = results.get(f"{own.name}.made")
        if other is not None and _contradict(own, other, {}):
            yield own, other


def _says_more(claim: ir.Value, made: ir.Value) -> bool:
    """Whether a rank or a length is claimed that inference does not find."""
    if claim.shape is None or made.shape is None:
        return claim.shape is not None
    claimed = (isinstance(d, int) for d in claim.shape)
    found = (isinstance(d, int) and d >= 0 for d in made.shape)
    return any(a and not b for a, b in zip(claimed, found, strict=False))


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
