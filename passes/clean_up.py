"""Remove what no longer has an effect: Identity, multiplication by one, unused nodes, initializers and opsets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass, TopologicalSortPass

SMALL = 1 << 16
"""Constants up to this many elements are looked at for ones."""


@dataclass(frozen=True)
class CleanUp(ir.passes.InPlacePass):
    """Remove nodes that copy their input and everything that no output needs."""

    protected: frozenset[str] = frozenset()
    """Initializers whose values are not looked at: a parameter stays a parameter, even if it is all ones."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` counts removed nodes and initializers."""
        graph = model.graph
        removed = 0
        for node in graph:
            if (source := self._copied_input(node)) is not None and _may_stand_in(source, node.outputs[0]):
                ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=True)
        for node in reversed(graph):
            if not any(out.uses() or out.is_graph_output() for out in node.outputs):
                graph.remove(node, safe=True)
                removed += 1
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                graph.initializers.pop(name)
                removed += 1
        TopologicalSortPass()(model)
        RemoveUnusedOpsetsPass()(model)
        return ir.passes.PassResult(model, modified=removed > 0)

    def _copied_input(self, node: ir.Node) -> ir.Value | None:
        """The input that `node` passes on unchanged, if it does."""
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Identity":
            return node.inputs[0]
        if node.op_type == "Mul":
            for value, other in (node.inputs, node.inputs[::-1]):
                if (
                    value is not None
                    and other is not None
                    and self._is_ones(other)
                    and value.shape == node.outputs[0].shape
                ):
                    return value
        return None

    def _is_ones(self, value: ir.Value) -> bool:
        tensor = value.const_value
        if not value.is_initializer() or value.name in self.protected or tensor is None or tensor.size > SMALL:
            return False
        return bool(np.all(tensor.numpy() == 1))


def _may_stand_in(source: ir.Value, out: ir.Value) -> bool:
    """A graph input or initializer cannot also be a graph output under another name."""
    return not out.is_graph_output() or (source.producer() is not None and not source.is_graph_output())
