"""Move what the graphs of several contexts have in common into one graph.

inputs           those of the first context
initializers     one per name and content
first nodes      nodes that compute the same from inputs and weights in all contexts
last nodes       nodes that compute the same from the one value in which the contexts differ
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from cpcompile.passes.operators import RANDOM, is_standard

PLAIN = frozenset(ir.AttributeType[kind] for kind in ("INT", "INTS", "FLOAT", "FLOATS", "STRING", "STRINGS", "TENSOR"))
"""Types of attributes that can be compared by value."""


@dataclass(frozen=True)
class Part:
    """The rest of one context's graph; `outputs` replaces the graph's own outputs and changes as nodes leave."""

    context: str
    graph: ir.Graph
    outputs: list[ir.Value]

    @classmethod
    def of(cls, context: str, graph: ir.Graph) -> Part:
        """The whole `graph`, whose outputs move to the part."""
        outputs = list(graph.outputs)
        graph.outputs.clear()
        return cls(context, graph, outputs)

    def replace(self, value: ir.Value, other: ir.Value) -> None:
        """Read `other` instead of `value`."""
        ir.convenience.replace_all_uses_with(value, other)
        self.outputs[:] = [other if out is value else out for out in self.outputs]

    def prefix_names(self) -> None:
        """Put the context before all names, which makes them unique in all scopes."""
        for node in self.graph.all_nodes():
            node.name = f"{self.context}/{node.name}"
            for out in node.outputs:
                out.name = f"{self.context}/{out.name}"
        for inner in self.graph.subgraphs():
            for value in (*inner.inputs, *inner.initializers.values()):
                value.name = f"{self.context}/{value.name}"

    def branch(self) -> ir.Graph:
        """The nodes as a graph without inputs. A result that is not computed in it, or occurs twice, becomes a copy."""
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


def share_inputs(graph: ir.Graph, parts: Sequence[Part]) -> None:
    """Use the inputs of the first context for all."""
    inputs = [list(part.graph.inputs) for part in parts]
    for part in parts:
        part.graph.inputs.clear()
    graph.inputs.extend(inputs[0])
    for part, own in zip(parts[1:], inputs[1:], strict=True):
        for value, shared in zip(own, inputs[0], strict=True):
            part.replace(value, shared)


def share_initializers(graph: ir.Graph, parts: Sequence[Part]) -> None:
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
    """Whether both tensors are equal; tensors at the same place in a file are not read."""
    if first is None or second is None or first is second:
        return first is second
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if isinstance(first, ir.ExternalTensor) and isinstance(second, ir.ExternalTensor):
        places = {(str(tensor.path), tensor.offset) for tensor in (first, second)}
        if len(places) == 1:
            return True
    return _content(first) == _content(second)


def _content(tensor: ir.TensorProtocol) -> Hashable:
    """The bytes of a tensor, or the elements of one of strings."""
    return tuple(tensor.numpy().reshape(-1)) if tensor.dtype == ir.DataType.STRING else tensor.tobytes()


def share_first_nodes(graph: ir.Graph, parts: Sequence[Part]) -> None:
    """Move to `graph` the nodes that compute the same from inputs and weights; outputs stay in the branches."""
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
    """A key that is equal for operands that are the same in all contexts; None if that is not known."""
    if value is None or (producer := value.producer()) is None:
        return id(value)
    return (computed[producer], value.index()) if producer in computed else None


def _settings(node: ir.Node) -> Hashable:
    """Operator and attributes; None if they and the inputs do not determine the result."""
    if is_standard(node) and node.op_type in RANDOM:
        return None
    if any(attribute.type not in PLAIN for attribute in node.attributes.values()):
        return None
    attributes = [
        (name, (t.dtype, str(t.shape), _content(t)) if isinstance(t := attribute.value, ir.TensorProtocol) else str(t))
        for name, attribute in sorted(node.attributes.items())
    ]
    return (*node.op_identifier(), len(node.outputs), tuple(attributes))


def share_last_nodes(parts: Sequence[Part], index: int) -> list[tuple[ir.Node, int]]:
    """Remove the nodes before output `index` as long as contexts differ only in one value that they read.

    Returns those of the first context, from the output backwards, each with the index of that input.
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


def _alike(parts: Sequence[Part], index: int) -> tuple[list[ir.Node], int] | None:
    """The nodes that make output `index`, and the index of the one input in which they differ; None otherwise."""
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
