"""Drop the exporter's notes for debugging, except for the module that a node came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from cpcompile.files.onnx_file import MODULE, module_of
from cpcompile.passes.graph_pass import GraphPass


@dataclass(frozen=True)
class StripMetadata(GraphPass):
    """Keep one short property per node: a model should not carry stack traces of the machine that exported it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` counts dropped properties and descriptions."""
        dropped = 0
        for node in model.graph.all_nodes():
            module = module_of(node)
            kept = {MODULE: module} if module else {}
            dropped += len(node.metadata_props.keys() - kept.keys()) + (module != node.metadata_props.get(MODULE, ""))
            node.metadata_props.clear()
            node.metadata_props.update(kept)
            dropped += bool(node.doc_string)  # where older exporters put the stack trace
            node.doc_string = None
        for value in _values(model):
            dropped += len(value.metadata_props)
            value.metadata_props.clear()
        return ir.passes.PassResult(model, modified=dropped > 0)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from (*graph.inputs, *graph.initializers.values())
        for node in graph:
            yield from node.outputs
