"""Run some nodes of a graph by themselves.

Everything they read, weights included, is an input of a graph of their own: ONNX Runtime then uses the arrays in
place, and only the mapped weights of these nodes are in memory, and only while they run. A session of
one node takes 0.3 ms, so that a whole graph can be run node by node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

Values = Mapping[str, Any]
"""Arrays by name; a sequence is a list of arrays."""


@dataclass(frozen=True)
class Fragment:
    """Nodes of `model`, in topological order."""

    model: ir.Model
    nodes: tuple[ir.Node, ...]

    @cached_property
    def reads(self) -> Mapping[str, ir.Value]:
        """Values from outside, weights included, even if only a subgraph of an If, Loop or Scan reads them."""
        made = {out for node in self.nodes for out in node.outputs}
        read = (value for node in self.nodes for value in _read_by(node) if value not in made)
        return {value.name or "": value for value in read}

    def weights(self, given: Values) -> dict[str, Any]:
        """Those initializers among `reads` that are not `given`, read again: the mapping is freed with the array."""
        return {
            name: read_tensor(value.const_value)
            for name, value in self.reads.items()
            if name not in given and value.is_initializer() and value.const_value is not None
        }

    def run(
        self, given: Values, outputs: Sequence[str], *, change: Callable[[Any], Any] = lambda value: value
    ) -> list[Any]:
        """The values `outputs`, from `given` and the weights after `change`; ONNX Runtime's errors pass through."""
        feeds = {name: change(value) for name, value in {**given, **self.weights(given)}.items()}
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # no pool of threads for each node
        options.enable_cpu_mem_arena = False  # memory that a node needed is released
        proto = self.proto(feeds, outputs)
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results = session.run(list(outputs), feeds)
        return [value if isinstance(value, list) else np.asarray(value) for value in results]

    def proto(self, inputs: Values, outputs: Sequence[str], *, weights: Values | None = None) -> onnx.ModelProto:
        """A model of these nodes with inputs like `inputs`; `weights` are in it."""
        graph = onnx.helper.make_graph(
            [ir.to_proto(node) for node in self.nodes],
            "fragment",
            [_info(name, value) for name, value in inputs.items()],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
        )
        called = any(node.op_identifier() in self.model.functions for node in self.nodes)
        return onnx.helper.make_model(
            graph,
            ir_version=self.model.ir_version,
            opset_imports=[onnx.helper.make_opsetid(*item) for item in self.model.opset_imports.items()],
            functions=[ir.to_proto(function) for function in self.model.functions.values()] if called else [],
        )


def read_tensor(tensor: ir.TensorProtocol) -> Any:
    """The array of `tensor`, which does not remember it."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name or "",
            base_dir=tensor.base_dir,
        )
    return tensor.numpy()


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        single, several = attribute.type == ir.AttributeType.GRAPH, attribute.type == ir.AttributeType.GRAPHS
        for subgraph in [attribute.as_graph()] if single else attribute.as_graphs() if several else ():
            inside = (value for inner in subgraph.all_nodes() for value in inner.inputs if value is not None)
            yield from (value for value in (*inside, *subgraph.outputs) if value.graph is node.graph)


def _info(name: str, value: Any) -> onnx.ValueInfoProto:
    arrays = value if isinstance(value, list) else [value]
    kind = onnx.helper.np_dtype_to_tensor_dtype(arrays[0].dtype) if arrays else onnx.TensorProto.FLOAT
    if isinstance(value, list):
        return onnx.helper.make_tensor_sequence_value_info(name, kind, None)
    return onnx.helper.make_tensor_value_info(name, kind, np.shape(value))
