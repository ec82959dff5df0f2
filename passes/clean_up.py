"""Remove what no longer has an effect: Identity, multiplication by one, unused nodes, initializers and opsets.

It also cleans the subgraphs of If, Loop and Scan, and functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass, TopologicalSortPass

from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import constant_of, made_by, optional_input, subgraphs_of
from cpcompile.passes.operators import is_standard

STEPS = 4
"""The input of a Slice that says how far apart the kept elements are."""
SMALL = 1 << 16
"""Constants with at most this many elements are checked for ones."""


@dataclass(frozen=True)
class CleanUp(GraphPass):
    """Remove nodes that copy their input and everything that no output needs."""

    protected: frozenset[str] = frozenset()
    """Initializers whose values are ignored: a parameter stays a parameter, even if it is all ones."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` counts removed nodes and initializers, and says whether nodes were sorted."""
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        removed = sum(self._clean(graph) for graph in graphs)
        moved = [tidy(model).modified for tidy in (TopologicalSortPass(), RemoveUnusedOpsetsPass())]
        return ir.passes.PassResult(model, modified=removed > 0 or any(moved))

    def _clean(self, graph: ir.Graph) -> int:
        """Clean `graph` and its subgraphs; last nodes first, so that what only removed nodes need goes as well."""
        removed = 0
        for node in graph:
            if (source := self._copied_input(node)) is not None:
                replace_value(source, node.outputs[0])
        for node in reversed(graph):
            if any(out.uses() or out.is_graph_output() for out in node.outputs):
                removed += sum(self._clean(subgraph) for subgraph in subgraphs_of(node))
                continue
            for inner in (inner for subgraph in subgraphs_of(node) for inner in subgraph.all_nodes()):
                inner.resize_inputs(0)  # what it reads from outside is not read any more
            graph.remove(node, safe=True)
            removed += 1
        for name, value in list(graph.initializers.items()):
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                graph.initializers.pop(name)
                removed += 1
        return removed

    def _copied_input(self, node: ir.Node) -> ir.Value | None:
        """The input that `node` passes on unchanged, if it does."""
        if not is_standard(node):
            return None
        if node.op_type == "Identity":
            return node.inputs[0]
        if node.op_type == "Expand":
            return node.inputs[0] if same_shape(node.inputs[0], node.outputs[0]) else None
        if node.op_type == "Mul":
            for value, other in (node.inputs, node.inputs[::-1]):
                if other is not None and self._is_ones(other) and same_shape(value, node.outputs[0]):
                    return value
        return None

    def _is_ones(self, value: ir.Value) -> bool:
        tensor = constant_of(value)
        if value.name in self.protected or tensor is None or tensor.size > SMALL:
            return False
        return bool(np.all(tensor.numpy() == 1))


def same_shape(value: ir.Value | None, out: ir.Value) -> bool:
    """Whether both certainly have the same shape: an unknown dimension equals nothing."""
    if value is None or value.shape is None or out.shape is None or value.shape.has_unknown_dim():
        return False
    return bool(value.shape == out.shape)


def unsliced(value: ir.Value | None) -> ir.Value | None:
    """What `value` is a slice of, if that slice takes everything."""
    node = made_by(value, "Slice")
    if value is None or node is None:
        return value
    steps = optional_input(node, STEPS)
    step = None if steps is None else constant_of(steps)
    in_order = steps is None or (step is not None and bool((step.numpy() == 1).all()))
    return unsliced(node.inputs[0]) if in_order and same_shape(node.inputs[0], value) else value


def replace_value(source: ir.Value, out: ir.Value) -> bool:
    """Replace the value `out` by the equal value `source`; False if that is not possible.

    An output of the graph keeps its name; a graph input or an initializer cannot also be an output under
    another name, and a value cannot be an output twice.
    """
    if out.is_graph_output():
        if source.producer() is None or source.is_graph_output() or source.graph is not out.graph:
            return False
        name, out.name = out.name, f"{out.name}.replaced"
        source.name = name
        source.type = out.type if source.type is None else source.type
        source.shape = out.shape if source.shape is None else source.shape
    ir.convenience.replace_all_uses_with(out, source, replace_graph_outputs=True)
    return True
