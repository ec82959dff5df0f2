"""Random graphs in the styles of vision, sequence and detection models, with zeros that elimination can remove.

Every node runs in ONNX Runtime when it is added: its outputs have real shapes and values, and what the runtime refuses
is left out. So the blocks below can try whatever comes to mind: negative axes and indices, steps backwards, groups,
uneven parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]
LARGEST, ELEMENTS, RANK = 1e3, 20_000, 5
LAST = np.iinfo(np.int64).max


class RejectedError(Exception):
    """ONNX Runtime does not take the node, or its values are too large."""


def session_of(model: onnx.ModelProto) -> ort.InferenceSession:
    """One thread, no optimisations: the graph as it stands."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def info_of(name: str, array: Array, shape: Sequence[Any] | None = None) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, kind, array.shape if shape is None else shape)


@dataclass
class Writer:
    """Adds nodes; knows the value of everything."""

    rng: np.random.Generator
    opset: int
    values: dict[str, Array] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    pool: list[str] = field(default_factory=list)
    count: int = 0

    # --- drawing

    def chance(self, part: float) -> bool:
        return bool(self.rng.random() < part)

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def number(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].shape

    def axis(self, x: str, first: int = 1) -> int:
        """An axis of `x`, counted from either end; the batch only if `first` is 0."""
        rank = len(self.shape(x))
        if rank <= first:
            raise RejectedError("no axis")
        axis = self.number(first, rank - 1)
        return axis - rank if self.chance(0.5) else axis

    def spelled(self, axis: int, rank: int) -> int:
        """The axis counted from either end."""
        return axis % rank - rank if self.chance(0.5) else axis % rank

    def some_index(self, length: int) -> int:
        return self.number(-length, length - 1)

    # --- writing

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def const(self, array: Any, dtype: Any = None) -> str:
        """A constant: an initializer, or a node."""
        array = np.asarray(array, dtype=dtype)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        name = self.name("c")
        self.values[name] = array
        tensor = numpy_helper.from_array(array, name)
        if self.chance(0.15):
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers[name] = tensor
        return name

    def ints(self, *numbers: int) -> str:
        return self.const(np.array(numbers, dtype=np.int64))

    def weight(self, *shape: int, zero: Sequence[int] = ()) -> str:
        """Normal numbers, with zeros for some channels of the axes `zero`."""
        array = self.rng.standard_normal(shape) / max(1, int(np.prod(shape[1:]))) ** 0.5
        for axis in zero:
            if self.chance(0.5):
                array[(slice(None),) * axis + (self.zeros(shape[axis]),)] = 0
        return self.const(array)

    def zeros(self, length: int) -> Array:
        """Which channels are zero: often many, rarely all or none."""
        return self.rng.random(length) < self.pick([0.3, 0.5, 0.8, 1.0 if self.chance(0.2) else 0.6])

    def op(self, kind: str, *inputs: str, outputs: int = 1, reads: Sequence[str] = (), **attributes: Any) -> Any:
        """Add a node; the name of its output, or the names of its outputs."""
        names = [self.name("v") for _ in range(outputs)]
        domain = attributes.pop("domain", "")
        node = helper.make_node(
            kind, list(inputs), names, name=self.name("node_") if self.chance(0.6) else "", domain=domain, **attributes
        )
        found = self.evaluate(node, reads)
        for array in found:
            if array.size > ELEMENTS or array.ndim > RANK:
                raise RejectedError("too large")
            if array.dtype.kind == "f" and not (np.isfinite(array).all() and np.abs(array).max(initial=0) < LARGEST):
                raise RejectedError("large numbers")
        self.nodes.append(node)
        self.values.update(zip(names, found, strict=True))
        return names[0] if outputs == 1 else names

    def evaluate(self, node: onnx.NodeProto, reads: Sequence[str]) -> list[Array]:
        names = [name for name in dict.fromkeys((*node.input, *reads)) if name]
        fixed = [numpy_helper.from_array(self.values[name], name) for name in names if name.startswith("c")]
        fed = {name: self.values[name] for name in names if not name.startswith("c")}
        graph = helper.make_graph(
            [node],
            "one",
            [info_of(name, array) for name, array in fed.items()],
            [onnx.ValueInfoProto(name=name) for name in node.output],
            fixed,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        try:
            return [np.asarray(array) for array in session_of(model).run(None, fed)]
        except Exception as error:  # ONNX Runtime has no common error class
            raise RejectedError(str(error)) from error

    def gate(self, x: str, axis: int) -> str:
        """`x` with some channels of an axis at zero, in one of many ways."""
        shape, rank = self.shape(x), len(self.shape(x))
        axis %= rank
        dead = self.zeros(shape[axis])
        scale = np.where(dead, 0, self.rng.uniform(0.5, 1.5, shape[axis]))
        wide = [1] * self.pick([rank - axis, rank]) if axis else [1] * rank
        wide[axis - rank] = shape[axis]
        way = self.number(0, 4)
        if way == 0:
            return str(self.op("Where", self.const(dead.reshape(wide)), self.const(np.float32(0)), x))
        if way == 1:
            return str(self.op("Where", self.const(~dead.reshape(wide)), x, self.const(np.float32(0))))
        operands = [x, self.const(scale.reshape(wide).astype(np.float32))]
        return str(self.op("Mul", *(operands if way != 2 else operands[::-1])))

    # --- subgraphs

    @contextmanager
    def subgraph(self) -> Iterator[list[onnx.NodeProto]]:
        """Nodes that are added go into the list."""
        outside, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outside

    def graph(self, name: str, nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str]) -> onnx.GraphProto:
        """A subgraph, whose interface has types and sometimes shapes."""

        def info(value: str) -> onnx.ValueInfoProto:
            found = info_of(value, self.values[value], [None] * len(self.shape(value)))
            if self.chance(0.5) and len(self.shape(value)):
                found.type.tensor_type.ClearField("shape")
            return found

        return helper.make_graph(nodes, name, [info(each) for each in inputs], [info(each) for each in outputs])

    @staticmethod
    def captured(nodes: list[onnx.NodeProto]) -> set[str]:
        """What the nodes read from outside; they have no subgraphs."""
        made = {name for node in nodes for name in node.output}
        return {name for node in nodes for name in node.input if name} - made


Block = Callable[[Writer, str], "str | Sequence[str]"]
