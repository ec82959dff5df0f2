"""float32 -> float16 or bfloat16, by the types of the graph: what an engine with strong typing then computes in.

    products    MatMul, Gemm, Conv, Attention, …               in half precision
    sensitive   norms, softmax, sums, exp, powers, angles, …   in float32, Casts around them
    the rest    in half precision where every operand is, in float32 otherwise, as torch.autocast promotes

Weights take the type of the node that reads them; inputs and outputs of the graph keep theirs. Also kept in float32:
products of positions (bfloat16 cannot hold all integers above 256), nodes that read a constant beyond the range of the
type, nodes whose operator does not exist in it, and the subgraphs of If, Loop and Scan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from cpcompile.core.errors import CpcompileError
from cpcompile.files.onnx_file import opset_of
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import constant_of, subgraphs_of
from cpcompile.passes.operators import is_standard

FLOAT = ir.DataType.FLOAT
HALVES: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
"""The supported types, by the names that variants have for them."""
PRODUCTS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention"))
NORMS = (
    *(f"{kind}Normalization" for kind in ("RMS", "Layer", "Group", "Instance", "Batch", "Lp", "MeanVariance")),
    *("LRN", "Softmax", "LogSoftmax"),
)
SUMS = (
    *(f"Reduce{kind}" for kind in ("Mean", "Sum", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")),
    "CumSum",
)
SENSITIVE = frozenset((*NORMS, *SUMS, "Softplus", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Cos", "Sin", "Tan"))
FOLLOW_THEIR_SCALE = frozenset({"DequantizeLinear"})
"""Operators whose output has the type of an input, although their schema names the two types separately."""

Ports = tuple[Sequence[int], Sequence[int]]
"""Indices of the inputs and outputs of a node that are float32 and can change together."""


@dataclass(frozen=True)
class LowerPrecision(GraphPass):
    """Compute in `precision`, fp16 or bf16, what does not need float32.

    The graph has to be sorted, and its values need types. The last product is in half precision too: in float32 it
    would improve logits by a hundredth, and make a tied embedding three times as large.
    """

    precision: str

    @property
    def _half(self) -> ir.DataType:
        return HALVES[self.precision]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` counts nodes that compute in half precision now."""
        LiftConstantsToInitializersPass()(model)
        lowered = self._plan(model.graph)
        copies: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        for node, (_, outputs) in lowered.items():
            for index in outputs:
                node.outputs[index].type = ir.TensorType(self._half)  # clones share the type that it had
        for node, (inputs, outputs) in lowered.items():
            for index in inputs:
                value = node.inputs[index]
                assert value is not None
                if value.dtype is FLOAT:
                    node.replace_input_with(index, self._copy(value, self._half, node, copies))
            for value in (node.outputs[index] for index in outputs):
                self._restore(value, lowered, copies)
        _drop_unread(model.graph, copies)
        return ir.passes.PassResult(model, modified=bool(lowered))

    def _plan(self, graph: ir.Graph) -> dict[ir.Node, Ports]:
        """The nodes that compute in half precision."""
        lowered: dict[ir.Node, Ports] = {}
        half: set[ir.Value] = set()
        positions: set[ir.Value] = set()
        opset = opset_of(graph)
        for node in graph:
            ports = _ports(node, opset, self._half)
            read = [value for index in ports[0] if (value := node.inputs[index]) is not None] if ports else []
            variables = [value for value in read if constant_of(value) is None]
            counted = node.op_type not in PRODUCTS and bool(variables) and all(v in positions for v in variables)
            if counted or _counts(node):
                positions.update(node.outputs)
            if ports is None or node.op_type in SENSITIVE or any(self._overflows(value) for value in read):
                continue
            if node.op_type in PRODUCTS:
                fits = not any(value in positions for value in variables)
            else:
                fits = all(value in half for value in variables)
            if fits:
                lowered[node] = ports
                half.update(node.outputs[index] for index in ports[1])
        return lowered

    def _overflows(self, value: ir.Value) -> bool:
        """Whether `value` is a constant with finite elements that are infinite in half precision."""
        tensor = constant_of(value)
        if tensor is None or self._half is not ir.DataType.FLOAT16:
            return False
        array = tensor.numpy()
        return bool((np.abs(array[np.isfinite(array)]) > np.finfo(np.float16).max).any())

    def _copy(
        self, value: ir.Value, dtype: ir.DataType, reader: ir.Node, copies: dict[tuple[ir.Value, ir.DataType], ir.Value]
    ) -> ir.Value:
        """`value` in `dtype`: a constant of that type, or a Cast; all readers share it."""
        if (value, dtype) in copies:
            return copies[value, dtype]
        graph, tensor = reader.graph, constant_of(value)
        assert isinstance(graph, ir.Graph)
        copied = ir.Value(name=f"{value.name}.{dtype.short_name()}", type=ir.TensorType(dtype), shape=value.shape)
        if tensor is not None:
            copied.const_value = _converted(tensor, dtype, copied)
            graph.register_initializer(copied)
        else:
            attributes = [ir.AttrInt64("to", dtype.value)]
            producer = value.producer()
            origin = reader if reader.metadata_props or producer is None else producer  # tells the torch module
            props = dict(origin.metadata_props)
            cast = ir.Node("", "Cast", [value], attributes, outputs=[copied], name=copied.name, metadata_props=props)
            if producer is not None:
                graph.insert_after(producer, cast)
            else:
                graph.insert_before(graph[0], cast)
        copies[value, dtype] = copied
        return copied

    def _restore(
        self, value: ir.Value, lowered: Mapping[ir.Node, Ports], copies: dict[tuple[ir.Value, ir.DataType], ir.Value]
    ) -> None:
        """Cast `value`, now in half precision, to float32 for the nodes that read that, and for the caller."""
        for node, index in tuple(value.uses()):
            wanted = node in lowered and index in lowered[node][0]
            made = copies.get((value, FLOAT))
            if not wanted and (made is None or node is not made.producer()):
                reader = value.producer() if node.graph is not value.graph else node
                assert reader is not None
                node.replace_input_with(index, self._copy(value, FLOAT, reader, copies))
        graph = value.graph
        if value.is_graph_output() and graph is not None:
            maker = value.producer()
            assert maker is not None
            whole = self._copy(value, FLOAT, maker, copies)
            for index, out in enumerate(graph.outputs):
                if out is value:
                    graph.outputs[index] = whole
            value.name, whole.name = f"{value.name}.{self._half.short_name()}", value.name
            whole.metadata_props.update(value.metadata_props)


def _ports(node: ir.Node, opset: int, half: ir.DataType) -> Ports | None:
    """The float32 inputs and outputs of `node` that can become `half` together; None if the node has to stay."""
    schema = _schema(node.op_type, opset) if is_standard(node) else None
    if schema is None or subgraphs_of(node):
        return None
    types = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    inputs, outputs, bound = [], [], set()
    for index, value in enumerate(node.inputs):
        parameter = schema.inputs[min(index, len(schema.inputs) - 1)].type_str
        if value is None or not _is_float(value) or parameter not in types:
            continue  # a parameter of a fixed type has no type constraint
        if f"tensor({half.name.lower()})" not in types[parameter]:
            return None
        inputs.append(index)
        bound.add(parameter)
    for index, value in enumerate(node.outputs):
        if not _is_float(value):
            continue
        if schema.outputs[min(index, len(schema.outputs) - 1)].type_str in bound or _follows_scale(node):
            outputs.append(index)
        else:
            return None
    return (inputs, outputs) if inputs else None


def _follows_scale(node: ir.Node) -> bool:
    return node.op_type in FOLLOW_THEIR_SCALE and "output_dtype" not in node.attributes


def _is_float(value: ir.Value) -> bool:
    if value.type is None and (value.name or value.uses()):
        raise CpcompileError(f"the value {value.name!r} has no type; infer shapes first (the pass infer_shapes)")
    return isinstance(value.type, ir.TensorType) and value.dtype == FLOAT


def _counts(node: ir.Node) -> bool:
    """Whether `node` turns integers into floating-point numbers: positions and lengths."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "Range":
        return True
    return node.op_type == "Cast" and source is not None and source.dtype is not None and source.dtype.is_integer()


@cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _converted(tensor: ir.TensorProtocol, dtype: ir.DataType, value: ir.Value) -> ir.LazyTensor:
    """`tensor` in `dtype`, made only when it is read."""
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=value.name),
        dtype=dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=value.name,
    )


def _drop_unread(graph: ir.Graph, copies: Mapping[tuple[ir.Value, ir.DataType], ir.Value]) -> None:
    """Remove initializers of which only copies are read; the copies take their names."""
    for (value, _), copied in copies.items():
        if value.is_initializer() and not (value.uses() or value.is_graph_input() or value.is_graph_output()):
            assert value.name is not None
            graph.initializers.pop(value.name)
            copied.name = value.name
