"""Store a parameter the way it is used: Transpose(parameter) becomes the parameter, transposed, under its name.

Exporters write a linear layer as MatMul(x, Transpose(W)). An engine would transpose at load and hold
both copies for a while. If the head of a language model is its embedding, the engine would hold both forever:

    Gather(W, ids)  ->  Transpose(Gather(Transpose(W), ids, axis=1))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import constant_of, int_attribute, permutation
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
            if tensor is not None:
                _gather_columns(value)
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


def _gather_columns(value: ir.Value) -> None:
    """If `value` is a table whose rows are picked, and which others read transposed, pick from its transpose."""
    nodes = [node for node, _ in value.uses()]
    picks = [node for node in nodes if node.op_type == "Gather" and is_standard(node) and node.inputs[0] is value]
    others = [node for node in nodes if node not in picks]
    if not picks or not others or value.shape is None or value.shape.rank() != 2 or value.is_graph_output():
        return
    if any(n.op_type != "Transpose" or not is_standard(n) or permutation(n, 2) != [1, 0] for n in others):
        return
    indices = [node.inputs[1] for node in picks]
    if any(int_attribute(node, "axis", 0) not in (0, -2) or node.outputs[0].is_graph_output() for node in picks):
        return
    if any(each is None or each.shape is None for each in indices):
        return
    for node, index in zip(picks, indices, strict=True):
        assert node.graph is not None and index is not None and index.shape is not None
        picked, rank = node.outputs[0], index.shape.rank()
        turned = ir.node("Transpose", [value], {"perm": [1, 0]})
        gathered = ir.node("Gather", [turned.outputs[0], index], {"axis": 1})
        back = ir.node("Transpose", gathered.outputs, {"perm": [*range(1, rank + 1), 0]})
        gathered.outputs[0].type, gathered.outputs[0].shape = picked.type, ir.Shape([value.shape[1], *index.shape])
        back.outputs[0].type, back.outputs[0].shape = picked.type, picked.shape
        node.graph.insert_before(node, (turned, gathered, back))
        ir.convenience.replace_all_uses_with(picked, back.outputs[0])
        node.graph.remove(node, safe=True)
        names = (f"{picked.name}.table", f"{picked.name}.columns", picked.name)
        for each, name in zip((turned, gathered, back), names, strict=True):
            each.name, each.outputs[0].name = name, name
            each.metadata_props.update(node.metadata_props)


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
