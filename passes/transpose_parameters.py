"""Store a parameter the way it is used: Transpose(parameter) becomes the parameter, transposed, under its name.

Exporters write a linear layer as MatMul(x, Transpose(W)). An engine would transpose at load and hold
both copies for a while.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cpcompile.passes.nodes import constant_of, permutation
from cpcompile.passes.operators import is_standard


@dataclass
class Transposition(ir.passes.PassResult):
    """`permutations`: parameter -> the permutation of its axes."""

    permutations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TransposeParameters(ir.passes.InPlacePass):
    """Transpose initializers whose only use is to be transposed."""

    def call(self, model: ir.Model) -> Transposition:
        """Edit `model`; `modified` counts transposed parameters."""
        graph = model.graph
        permutations: dict[str, tuple[int, ...]] = {}
        for node in list(graph):
            value = node.inputs[0] if node.op_type == "Transpose" and is_standard(node) else None
            if value is None or not value.is_initializer() or len(value.uses()) != 1 or value.is_graph_output():
                continue
            tensor, out = constant_of(value), node.outputs[0]
            if tensor is None or out.is_graph_output():
                continue
            order = tuple(permutation(node, len(tensor.shape)))
            ir.convenience.replace_all_uses_with(out, value)
            graph.remove(node, safe=True)
            value.shape = ir.Shape([tensor.shape.numpy()[axis] for axis in order])
            value.const_value = _transposed(tensor, order, value)
            permutations[value.name or ""] = order
        return Transposition(model, bool(permutations), permutations)


def _transposed(tensor: ir.TensorProtocol, order: tuple[int, ...], value: ir.Value) -> ir.LazyTensor:
    """The transposed tensor, made only when it is read."""
    assert value.shape is not None
    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(order)), name=value.name),
        dtype=tensor.dtype,
        shape=value.shape,
        name=value.name,
    )
