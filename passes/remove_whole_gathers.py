"""Remove Gathers that select everything in order: Gather(x, [0, 1, .., n - 1]) -> x if x has length n.

Passes that keep a part of something, such as `PruneExperts`, select it with a Gather; once channels are cut, that
part is everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpcompile.passes.clean_up import replace_value
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import constant_of, int_attribute
from cpcompile.passes.operators import is_standard


@dataclass(frozen=True)
class RemoveWholeGathers(GraphPass):
    """Replace a Gather that selects everything by its input."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` counts removed nodes."""
        graph, removed = model.graph, 0
        for node in graph:
            data = node.inputs[0] if _takes_everything(node) else None
            if data is not None and replace_value(data, node.outputs[0]):
                graph.remove(node, safe=True)
                removed += 1
        return ir.passes.PassResult(model, modified=removed > 0)


def _takes_everything(node: ir.Node) -> bool:
    if node.op_type != "Gather" or not is_standard(node):
        return False
    data, index = node.inputs[0], node.inputs[1]
    picked = None if index is None else constant_of(index)
    if data is None or data.shape is None or picked is None or picked.shape.rank() != 1:
        return False
    everything = data.shape[int_attribute(node, "axis", 0)] == picked.size
    return everything and np.array_equal(picked.numpy(), np.arange(picked.size))
