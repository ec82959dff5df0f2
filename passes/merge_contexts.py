"""One graph for many contexts: `If` on the context, and what contexts share is there once.

    known = Gather([0, 1, 2, ...], context)          no such context: an error of the engine
    a     = what all contexts compute alike, before they part
    b     = If(known < n / 2, If(...), If(...))      one branch per context, a balanced tree
    y     = what all contexts compute alike, after they have parted

All weights lie in the outer scope, where every branch reads them, and each is there once. A balanced tree, because
a chain would ask n / 2 conditions on average, and every level nests the file three messages deeper: protobuf
readers stop at 100, which are 33 contexts.

ONNX Runtime lays weights out anew for its kernels (prepacking), once per node: what n branches read, it would hold n
times. It does so in the outermost If only, so that two contexts behave unlike three; run with
`session.disable_prepacking` = "1", and weights stay mapped from their file, once. What every branch would
fold for itself, such as a transposed embedding, is outside for the same reason.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from cpcompile.errors import CpcompileError, UsageError
from cpcompile.passes.symbolic_shapes import is_standard

CONTEXTS = "contexts"
"""Metadata of the merged model: the names of its contexts, in the order of their numbers, as a JSON list."""
PLAIN = frozenset(ir.AttributeType[kind] for kind in ("INT", "INTS", "FLOAT", "FLOATS", "STRING", "STRINGS", "TENSOR"))
"""Attributes that can be compared by what they hold."""
NOT_ALIKE = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
"""Operators that give another result every time."""


def merge_contexts(models: Mapping[str, ir.Model], *, name: str = "context") -> ir.Model:
    """The graphs of all contexts as one, with the further input `name` (int64 scalar): the position in `models`.

    The graphs have the same inputs and outputs, and stay as they are; tensors are shared. Initializers of one name and
    content become one and keep the name, so that stored runs are found in the weights file; others, and
    what lies in a branch, are called `context/name`. A context that there is not is an error at run time.
    UsageError: fewer than two contexts. CpcompileError: inputs, outputs or opsets differ.
    """
    if len(models) < 2:
        raise UsageError(f"there are {len(models)} contexts to merge; give at least two")
    _require_one_interface(models, name)
    parts = [_Part.of(context, model.graph.clone()) for context, model in models.items()]
    opsets = {domain: version for model in models.values() for domain, version in model.graph.opset_imports.items()}
    graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name="merged")
    names = [value.name for value in parts[0].outputs]
    _share_inputs(graph, parts)
    _share_initializers(graph, parts)
    _share_first_nodes(graph, parts)
    last = [_share_last_nodes(parts, index) for index in range(len(names))]
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
    version = max(model.ir_version for model in models.values())
    merged = ir.Model(graph, ir_version=version, metadata_props={CONTEXTS: json.dumps(list(models))})
    NameFixPass()(merged)
    return merged


@dataclass(frozen=True)
class _Part:
    """What is left of the graph of one context; `outputs` are taken from it, and change as nodes leave it."""

    context: str
    graph: ir.Graph
    outputs: list[ir.Value]

    @classmethod
    def of(cls, context: str, graph: ir.Graph) -> _Part:
        outputs = list(graph.outputs)
        graph.outputs.clear()
        return cls(context, graph, outputs)

    def replace(self, value: ir.Value, other: ir.Value) -> None:
        """Read `other` instead of `value`."""
        ir.convenience.replace_all_uses_with(value, other)
        self.outputs[:] = [other if out is value else out for out in self.outputs]

    def prefix_names(self) -> None:
        """Names are unique in all scopes."""
        for node in self.graph.all_nodes():
            node.name = f"{self.context}/{node.name}"
            for out in node.outputs:
                out.name = f"{self.context}/{out.name}"
        for inner in self.graph.subgraphs():
            for value in (*inner.inputs, *inner.initializers.values()):
                value.name = f"{self.context}/{value.name}"

    def branch(self) -> ir.Graph:
        """The nodes as a graph without inputs. Every result is made in it, once: others are copied."""
        nodes = list(self.graph)
        self.graph.remove(nodes)
        results: list[ir.Value] = []
        for value in self.outputs:
            if value.producer() not in nodes or value in results:
                copy = ir.node("Identity", [value], name=f"{self.context}/output{len(results)}")
                copy.outputs[0].name = copy.name
                copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
                nodes.append(copy)
                value = copy.outputs[0]
            results.append(value)
        return ir.Graph([], results, nodes=nodes, name=self.context)


def _require_one_interface(models: Mapping[str, ir.Model], name: str) -> None:
    """All graphs can be called alike, and none has the input `name` already."""
    first = next(iter(models))
    expected = models[first].graph
    for context, model in models.items():
        graph = model.graph
        if any(value.name == name for value in graph.inputs):
            raise CpcompileError(f"{context}: has an input {name!r} already; freeze it first, or choose another name")
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


def _share_inputs(graph: ir.Graph, parts: Sequence[_Part]) -> None:
    """The inputs of the first context are those of all."""
    inputs = [list(part.graph.inputs) for part in parts]
    for part in parts:
        part.graph.inputs.clear()
    graph.inputs.extend(inputs[0])
    for part, own in zip(parts[1:], inputs[1:], strict=True):
        for value, shared in zip(own, inputs[0], strict=True):
            part.replace(value, shared)


def _share_initializers(graph: ir.Graph, parts: Sequence[_Part]) -> None:
    """Move all initializers to `graph`: one per name and content."""
    stored: dict[str, list[tuple[str, ir.Value]]] = {}
    for part in parts:
        for name, value in list(part.graph.initializers.items()):
            part.graph.initializers.pop(name)
            own = stored.setdefault(name, [])
            twin = next((other for _, other in own if _same_tensor(other.const_value, value.const_value)), None)
            if twin is None:
                own.append((part.context, value))
            else:
                part.replace(value, twin)
    for name, own in stored.items():
        for context, value in own:
            value.name = name if len(own) == 1 else f"{context}/{name}"
            graph.register_initializer(value)


def _same_tensor(first: ir.TensorProtocol | None, second: ir.TensorProtocol | None) -> bool:
    """Whether both hold the same; tensors at the same place of a file are not read."""
    if first is None or second is None or first is second:
        return first is second
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if isinstance(first, ir.ExternalTensor) and isinstance(second, ir.ExternalTensor):
        places = {(str(tensor.path), tensor.offset) for tensor in (first, second)}
        if len(places) == 1:
            return True
    return first.tobytes() == second.tobytes()


def _share_first_nodes(graph: ir.Graph, parts: Sequence[_Part]) -> None:
    """Move to `graph` what all contexts compute alike of inputs and weights; the results stay in the branches."""
    numbers: dict[Hashable, int] = {}
    computed: list[dict[ir.Node, int]] = []
    for part in parts:
        own: dict[ir.Node, int] = {}
        for node in part.graph:
            operands = [_operand(value, own) for value in node.inputs]
            settings = _settings(node)
            if settings is not None and None not in operands and not set(node.outputs) & set(part.outputs):
                own[node] = numbers.setdefault((settings, tuple(operands)), len(numbers))
        computed.append(own)
    common = set.intersection(*(set(own.values()) for own in computed))
    shared: dict[int, ir.Node] = {}
    for part, own in zip(parts, computed, strict=True):
        for node, number in own.items():
            if number in common and number not in shared:
                part.graph.remove(node)
                graph.append(node)
                shared[number] = node
            elif number in common:
                for out, twin in zip(node.outputs, shared[number].outputs, strict=True):
                    part.replace(out, twin)
                part.graph.remove(node, safe=True)


def _operand(value: ir.Value | None, computed: Mapping[ir.Node, int]) -> Hashable:
    """Equal for operands that are the same in all contexts; None where that is not known."""
    if value is None or (producer := value.producer()) is None:
        return id(value)
    return (computed[producer], value.index()) if producer in computed else None


def _settings(node: ir.Node) -> Hashable:
    """Operator and attributes; None for a node that these and its inputs do not determine."""
    if is_standard(node) and node.op_type in NOT_ALIKE:
        return None
    if any(attribute.type not in PLAIN for attribute in node.attributes.values()):
        return None
    attributes = [
        (name, (t.dtype, str(t.shape), t.tobytes()) if isinstance(t := attribute.value, ir.TensorProtocol) else str(t))
        for name, attribute in sorted(node.attributes.items())
    ]
    return (*node.op_identifier(), len(node.outputs), tuple(attributes))


def _share_last_nodes(parts: Sequence[_Part], index: int) -> list[tuple[ir.Node, int]]:
    """Take off the nodes before output `index` as long as contexts differ in nothing but one value that they read.

    Returns those of the first context, from the output backwards, each with the number of that input.
    """
    taken: list[tuple[ir.Node, int]] = []
    while (found := _alike(parts, index)) is not None:
        nodes, at = found
        for part, node in zip(parts, nodes, strict=True):
            value = node.inputs[at]
            assert value is not None
            part.outputs[index] = value
            part.graph.remove(node)
            for number in range(len(node.inputs)) if node is not nodes[0] else [at]:
                node.replace_input_with(number, None)
        taken.append((nodes[0], at))
    return taken


def _alike(parts: Sequence[_Part], index: int) -> tuple[list[ir.Node], int] | None:
    """The nodes that make output `index`, and the one input in which they differ."""
    nodes: list[ir.Node] = []
    for part in parts:
        out = part.outputs[index]
        node = out.producer()
        if node is None or node.graph is not part.graph or len(node.outputs) > 1 or part.outputs.count(out) > 1:
            return None
        if out.uses():
            return None
        nodes.append(node)
    settings = {_settings(node) for node in nodes}
    if None in settings or len(settings) > 1 or len({len(node.inputs) for node in nodes}) > 1:
        return None
    differing = [i for i, values in enumerate(zip(*(n.inputs for n in nodes), strict=True)) if len(set(values)) > 1]
    if len(differing) != 1:
        return None
    values = [node.inputs[differing[0]] for node in nodes]
    if any(value is None or value.is_initializer() for value in values):
        return None  # a choice of weights would copy them in every run
    return nodes, differing[0]


def _number_of_context(graph: ir.Graph, name: str, contexts: int) -> ir.Value:
    """The input `name`, looked up so that a number without a context is an error: Gather takes -1 for the last."""
    context = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(context)
    zero, beyond, table = (
        _constant(graph, f"{name}.{kind}", numbers)
        for kind, numbers in (("zero", 0), ("beyond", contexts), ("numbers", range(contexts)))
    )
    below = ir.node("Less", [context, zero], name=f"{name}.below")
    index = ir.node("Where", [below.outputs[0], beyond, context], name=f"{name}.index")
    known = ir.node("Gather", [table, index.outputs[0]], name=f"{name}.known")
    for node in (below, index, known):
        node.outputs[0].name = node.name
        graph.append(node)
    return known.outputs[0]


def _constant(graph: ir.Graph, name: str, numbers: npt.ArrayLike) -> ir.Value:
    tensor = ir.tensor(np.asarray(numbers, dtype=np.int64), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _choose(
    graph: ir.Graph, parts: Sequence[_Part], known: ir.Value, start: int = 0
) -> tuple[list[ir.Node], Sequence[ir.Value]]:
    """The nodes that run the part with the number `known` of those that count from `start`, and its results."""
    middle = len(parts) // 2
    name = f"{known.name}.below.{start + middle}"
    less = ir.node("Less", [known, _constant(graph, f"{name}.bound", start + middle)], name=name)
    less.outputs[0].name = name
    bodies = []
    for own, first in ((parts[:middle], start), (parts[middle:], start + middle)):
        if len(own) == 1:
            bodies.append(own[0].branch())
        else:
            nodes, results = _choose(graph, own, known, first)
            bodies.append(ir.Graph([], results, nodes=nodes, name=f"from.{first}"))
    choice = ir.node(
        "If",
        less.outputs,
        {"then_branch": bodies[0], "else_branch": bodies[1]},
        num_outputs=len(bodies[0].outputs),
        name=f"{name}.if",
    )
    for index, (out, *made) in enumerate(zip(choice.outputs, bodies[0].outputs, bodies[1].outputs, strict=True)):
        out.name, out.type, out.shape = f"{name}.output{index}", made[0].type, _common_shape(made[0], made[1])
    return [less, choice], choice.outputs


def _common_shape(first: ir.Value, second: ir.Value) -> ir.Shape | None:
    """What is the same in both shapes."""
    if first.shape is None or second.shape is None or first.shape.rank() != second.shape.rank():
        return None
    return ir.Shape([a if a == b else None for a, b in zip(first.shape, second.shape, strict=True)])
