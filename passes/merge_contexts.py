"""One graph for many contexts: an `If` on the context, and what contexts share is stored once.

    known = Gather([0, 1, 2, ...], context)          no such context: an error of the engine
    a     = what all contexts compute in the same way, before they differ
    b     = If(known < n / 2, If(...), If(...))      one branch per context, a balanced tree
    y     = what all contexts compute in the same way, after they differed

All weights lie in the outer scope, once, where every branch reads them. The tree is balanced because a chain would
evaluate n / 2 conditions on average, and every level nests the file three messages deeper: protobuf readers stop
at 100 levels, that is, at 33 contexts.

ONNX Runtime rearranges weights for its kernels (prepacking), once per node: weights that n branches read would be held
n times. It does so in the outermost If only, so that two contexts behave differently from three; with
`session.disable_prepacking` = "1", weights stay mapped from their file, once. What every branch would
fold for itself, such as a transposed embedding, is outside for the same reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.passes.context_parts import (
    Part,
    share_first_nodes,
    share_initializers,
    share_inputs,
    share_last_nodes,
)
from cpcompile.passes.nodes import add_constant
from cpcompile.passes.opset import require_opset

CONTEXTS = "contexts"
"""Metadata of the merged model: the names of its contexts, in the order of their numbers, as a JSON list."""
MIN_OPSET = 9
"""The first opset in which integers are compared (Less) and chosen (Where)."""


def merge_contexts(models: Mapping[str, ir.Model], *, name: str = "context") -> ir.Model:
    """The graphs of all contexts as one, with the further input `name` (int64 scalar): the position in `models`.

    The graphs have the same inputs and outputs, and stay as they are; tensors are shared. Initializers of one name and
    content become one and keep the name, so that stored runs are found in the weights file; others, and
    what lies in a branch, are called `context/name`. An unknown context is an error at run time.
    UsageError: fewer than two contexts. CpcompileError: inputs, outputs or opsets differ, or an input
    has a default.
    """
    if len(models) < 2:
        raise UsageError(f"there are {len(models)} contexts to merge; give at least two")
    _require_one_interface(models, name)
    parts = [Part.of(context, model.graph.clone()) for context, model in models.items()]
    opsets = {domain: version for model in models.values() for domain, version in model.graph.opset_imports.items()}
    graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name="merged")
    names = [value.name for value in parts[0].outputs]
    share_inputs(graph, parts)
    share_initializers(graph, parts)
    share_first_nodes(graph, parts)
    last = [share_last_nodes(parts, index) for index in range(len(names))]
    for part in parts:
        part.prefix_names()
    nodes, results = _choose(graph, parts, _number_of_context(graph, name, len(parts)))
    graph.extend(nodes)
    for output, value, taken in zip(names, results, last, strict=True):
        for node, at in reversed(taken):
            node.replace_input_with(at, value)
            graph.append(node)
            value = node.outputs[0]
        value.name = output
        graph.outputs.append(value)
    version = max(4, *(model.ir_version for model in models.values()))  # before 4, every initializer was an input
    merged = ir.Model(graph, ir_version=version, metadata_props={CONTEXTS: json.dumps(list(models))})
    NameFixPass()(merged)
    return merged


def _require_one_interface(models: Mapping[str, ir.Model], name: str) -> None:
    """Raise CpcompileError unless all graphs have the same inputs and outputs, and none an input `name`."""
    first = next(iter(models))
    expected = models[first].graph
    for context, model in models.items():
        graph = model.graph
        if any(value.name == name for value in graph.inputs):
            raise CpcompileError(f"{context}: has an input {name!r} already; freeze it first, or choose another name")
        require_opset(graph, MIN_OPSET, f"{context}: merging contexts")
        if defaults := [value.name for value in graph.inputs if value.is_initializer()]:
            raise CpcompileError(f"{context}: the input {defaults[0]!r} has a default; make it a constant first")
        if model.functions:
            raise CpcompileError(f"{context}: calls functions of its own; inline them first")
        inputs, others = ([f"{v.name} {v.dtype}{v.shape}" for v in each.inputs] for each in (graph, expected))
        if inputs != others:
            raise CpcompileError(f"{context}: has the inputs {', '.join(inputs)}; {first} has {', '.join(others)}")
        outputs, others = ([f"{v.name} {v.dtype}" for v in each.outputs] for each in (graph, expected))
        if outputs != others:
            raise CpcompileError(f"{context}: has the outputs {', '.join(outputs)}; {first} has {', '.join(others)}")
        for domain, version in graph.opset_imports.items():
            if version != (other := expected.opset_imports.get(domain, version)):
                raise CpcompileError(f"{context}: is in opset {version} of {domain or 'ONNX'}, {first} in {other}")


def _number_of_context(graph: ir.Graph, name: str, contexts: int) -> ir.Value:
    """The input `name` after a lookup that makes an unknown number an error: Gather takes -1 for the last."""
    context = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(context)
    zero, beyond, table = (
        add_constant(graph, f"{name}.{kind}", np.asarray(numbers, dtype=np.int64))
        for kind, numbers in (("zero", 0), ("beyond", contexts), ("numbers", range(contexts)))
    )
    below = ir.node("Less", [context, zero], name=f"{name}.below")
    index = ir.node("Where", [below.outputs[0], beyond, context], name=f"{name}.index")
    known = ir.node("Gather", [table, index.outputs[0]], name=f"{name}.known")
    for node in (below, index, known):
        node.outputs[0].name = node.name
        graph.append(node)
    return known.outputs[0]


def _choose(
    graph: ir.Graph, parts: Sequence[Part], known: ir.Value, start: int = 0
) -> tuple[list[ir.Node], Sequence[ir.Value]]:
    """The nodes that run the part with the number `known`, and its results; `parts` count from `start`."""
    middle = len(parts) // 2
    name = f"{known.name}.below.{start + middle}"
    less = ir.node("Less", [known, add_constant(graph, f"{name}.bound", np.array(start + middle))], name=name)
    less.outputs[0].name = name
    subgraphs = []
    for own, first in ((parts[:middle], start), (parts[middle:], start + middle)):
        if len(own) == 1:
            subgraphs.append(own[0].branch())
        else:
            nodes, results = _choose(graph, own, known, first)
            subgraphs.append(ir.Graph([], results, nodes=nodes, name=f"from.{first}"))
    choice = ir.node(
        "If",
        less.outputs,
        {"then_branch": subgraphs[0], "else_branch": subgraphs[1]},
        num_outputs=len(subgraphs[0].outputs),
        name=f"{name}.if",
    )
    for index, (out, *made) in enumerate(zip(choice.outputs, subgraphs[0].outputs, subgraphs[1].outputs, strict=True)):
        out.name, out.type, out.shape = f"{name}.output{index}", made[0].type, _common_shape(made[0], made[1])
    return [less, choice], choice.outputs


def _common_shape(first: ir.Value, second: ir.Value) -> ir.Shape | None:
    """The shape with every dimension that is the same in both; the others are unknown."""
    if first.shape is None or second.shape is None or first.shape.rank() != second.shape.rank():
        return None
    return ir.Shape([a if a == b else None for a, b in zip(first.shape, second.shape, strict=True)])
