"""Store a parameter the way it is used: Transpose(parameter) becomes the parameter, transposed, under its name.

Exporters write a linear layer as MatMul(x, Transpose(W)). An engine would transpose at load and hold
both copies for a while.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import constant_of, permutation
from cpcompile.passes.operators import is_standard


@dataclass
class Transposition(ir.passes.PassResult):
    """`permutations`: parameter -> the permutation of its axes."""

    permutations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TransposeParameters(GraphPass):
    """Transpose initializers that are only read to be transposed, all in the same way."""

    def call(self, model: ir.Model) -> Transposition:
        """Edit `model`; `modified` counts transposed parameters."""
        permutations: dict[str, tuple[int, ...]] = {}
        for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
            tensor, done = constant_of(value), None
            while tensor is not None and (order := _common_order(value)) is not None:
                for node, _ in tuple(value.uses()):
                    assert node.graph is not None
                    ir.convenience.replace_all_uses_with(node.outputs[0], value)
                    node.graph.remove(node, safe=True)
                done = order if done is None else tuple(done[axis] for axis in order)
            if tensor is not None and done is not None:
                value.shape = ir.Shape([tensor.shape.numpy()[axis] for axis in done])
                value.const_value = _transposed(tensor, done, value)
                permutations[value.name or ""] = done
        return Transposition(model, bool(permutations), permutations)


def _common_order(value: ir.Value) -> tuple[int, ...] | None:
    """The permutation by which all nodes that read `value` transpose it; None if some do something else."""
    nodes = [node for node, _ in value.uses()]
    if value.is_graph_output() or value.dtype == ir.DataType.STRING or value.shape is None:
        return None
    if any(n.op_type != "Transpose" or not is_standard(n) or n.outputs[0].is_graph_output() for n in nodes):
        return None
    orders = {tuple(permutation(node, value.shape.rank())) for node in nodes}
    return orders.pop() if len(orders) == 1 else None


def _transposed(tensor: ir.TensorProtocol, order: tuple[int, ...], value: ir.Value) -> ir.LazyTensor:
    """The transposed tensor, made only when it is read."""
    assert value.shape is not None
    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(order)), name=value.name),
        dtype=tensor.dtype,
        shape=value.shape,
        name=value.name,
    )
