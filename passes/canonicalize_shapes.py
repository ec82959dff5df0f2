"""Write target shapes explicitly: [0, 0, 8, 32] instead of a Concat of lengths measured on other tensors.

The exporter measures lengths wherever it needs them, even on axes whose channels will be cut. Once every
Reshape and Expand has an explicit target shape and known lengths are constants, only dynamic axes are still
measured, and cutting channels cannot change the meaning of a shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpcompile.passes.operators import is_standard
from cpcompile.passes.opset import MinOpsetPass
from cpcompile.passes.shape_inputs import plan_target_shape, set_target_shape, unique_name
from cpcompile.passes.shape_rules import infer_symbolic_shapes
from cpcompile.passes.symbolic_shapes import ShapeTable

MEASURING = ("Shape", "Slice", "Gather", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Mul", "Div")


@dataclass(frozen=True)
class CanonicalizeShapes(MinOpsetPass):
    """Make target shapes explicit and known lengths constant."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` counts rewritten inputs."""
        graph = model.graph
        table = infer_symbolic_shapes(graph)
        edits = 0
        for node in graph:
            if not is_standard(node):
                continue
            if node.op_type in ("Reshape", "Expand"):
                before = node.inputs[1]
                source, target = table.shape(node.inputs[0]), table.shape(node.outputs[0])
                produced = before is not None and before.producer() is not None
                if source is not None and target is not None and produced:
                    pieces = plan_target_shape(node, source, target, table)
                    edits += pieces is not None and set_target_shape(node, pieces, table)
            elif node.op_type in MEASURING and node.outputs[0].uses() and _is_integer(node.outputs[0]):
                edits += _make_constant(graph, node.outputs[0], table)
        return ir.passes.PassResult(model, modified=edits > 0)


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _make_constant(graph: ir.Graph, value: ir.Value, table: ShapeTable) -> bool:
    """Replace a vector of known lengths by a constant."""
    numbers = table.integers(value)
    if numbers is None or value.is_graph_output() or value.shape is None or value.dtype is None:
        return False
    if not value.shape.is_static() or math.prod(value.shape.numpy()) != len(numbers):
        return False
    array = np.asarray(numbers, dtype=value.dtype.numpy()).reshape(value.shape.numpy())
    name = unique_name(graph, f"{value.name}.known")
    constant = ir.Value(name=name, shape=value.shape, type=value.type, const_value=ir.tensor(array, name=name))
    graph.register_initializer(constant)
    ir.convenience.replace_all_uses_with(value, constant)
    return True
