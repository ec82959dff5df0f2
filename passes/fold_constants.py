"""Compute at compile time what does not depend on the inputs; parameters stay, under their names.

Results have the type and shape of the operator, overflow included. Where onnx's reference, which computes them, may
differ from an engine (sums of integers that overflow, what it makes of NaN, casts out of range, interpolation), the
node stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript.optimizer._constant_folding import FoldConstantsPass

from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import int_attribute
from cpcompile.passes.operators import ELEMENTWISE, NOT_ZERO_AT_ZERO, REDUCTIONS, ZERO_AT_ZERO, is_standard

MOVES = frozenset(
    (
        *(
            "Cast",
            "CastLike",
            "Compress",
            "Concat",
            "DepthToSpace",
            "Expand",
            "EyeLike",
            "Flatten",
            "Gather",
            "GatherND",
        ),
        *("Identity", "NonZero", "Pad", "Reshape", "ReverseSequence", "ScatterND", "Shape", "Size", "Slice"),
        *("SpaceToDepth", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"),
    )
)
"""Operators that only move what they read."""
SIMPLE = frozenset(("Add", "Sub", "Mul", "Div", "Neg", "Abs"))
"""Operators that treat infinity and NaN in the same way everywhere."""
COMPUTED = MOVES.union(
    ELEMENTWISE,
    ZERO_AT_ZERO,
    NOT_ZERO_AT_ZERO,
    REDUCTIONS,
    ("ArgMax", "ArgMin", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Clip", "CumSum", "Gemm"),
    ("MatMul", "Range", "Softmax", "LogSoftmax"),
)
"""Operators that are computed; the others stay, as they do where results are random."""
OVERFLOWING = frozenset(("Pow", "ReduceL2", "ReduceSumSquare"))
"""Operators on integers that engines compute in other types."""
ACCUMULATING = frozenset(("ReduceL1", "ReduceMean", "ReduceProd", "ReduceSum"))
"""Operators on integers that engines compute alike as long as nothing overflows."""


@dataclass(frozen=True)
class FoldConstants(GraphPass):
    """Fold constant expressions and list operators (SplitToSequence), then make every constant an initializer.

    An expression over a parameter (an initializer of floating-point or 8-bit numbers that is no scalar; exporters write
    constants as Constant nodes) is folded only if it picks one entry with Gather, such as the gates of a context: a
    computed, transposed or reordered copy under a new name would be a parameter that got lost.
    """

    limit: int = 1 << 20
    """Largest result in elements."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` says whether anything folded or was lifted."""
        stored = (value for graph in model.graphs() for value in graph.initializers.values())
        parameters = {value.name for value in stored if _is_parameter(value)}

        def may_fold(node: ir.Node) -> bool | None:
            reads_parameter = any(value is not None and value.name in parameters for value in node.inputs)
            computed = is_standard(node) and node.op_type in COMPUTED
            return None if computed and (_picks_one(node) or not reads_parameter) else False

        nodes = list(model.graph.all_nodes())
        with _without_defaults(model.graph):
            folded = _Folder(
                shape_inference=True, input_size_limit=self.limit, output_size_limit=self.limit, should_fold=may_fold
            )(model)
        for node in set(nodes).difference(model.graph.all_nodes()):
            node.resize_inputs(0)  # a branch that is not taken does not read the values outside any more
        there = {value for graph in model.graphs() for value in graph.initializers.values()}
        lifted = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        for value in (value for graph in model.graphs() for value in graph.initializers.values() if value not in there):
            tensor = value.const_value
            if tensor is not None and tensor.dtype != ir.DataType.STRING:
                # The model that this is a clone of has the same tensor, and would see it named when this one is saved.
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        return ir.passes.PassResult(model, modified=folded.modified or lifted.modified)


def _picks_one(node: ir.Node) -> bool:
    index = node.inputs[1] if node.op_type == "Gather" else None
    return index is not None and index.shape is not None and index.shape.rank() == 0


class _Folder(FoldConstantsPass):
    """Leaves alone what onnxscript (0.7) gets wrong."""

    def process_node(self, node: ir.Node, is_function: bool) -> Any:
        opset = self._opset_imports.get("", 0)
        return super().process_node(node, is_function) if _is_understood(node, opset) else None

    def new_initializer(self, node: ir.Node, array: Any) -> ir.Value | None:
        return super().new_initializer(node, array) if _is_certain(node, array) else None

    def new_constant(self, node: ir.Node, array: Any) -> ir.Node | None:
        return super().new_constant(node, array) if _is_certain(node, array) else None


def _is_certain(node: ir.Node, array: Any) -> bool:
    """Whether `array` is what every engine computes."""
    out, operator = node.outputs[0], node.op_type
    if not isinstance(array, np.ndarray) or out.dtype is None or out.dtype == ir.DataType.STRING:
        return False
    if array.dtype != out.dtype.numpy() or (out.shape is not None and not _is_of_shape(array, out.shape)):
        return False
    read = [value.const_value.numpy() for value in node.inputs if value is not None and value.const_value is not None]
    finite = all(bool(np.isfinite(each).all()) for each in (*read, array) if each.dtype.kind == "f")
    if not finite and operator not in MOVES | SIMPLE:
        return False
    if operator == "Range":
        return bool(array.dtype.kind == "i")
    if array.dtype.kind not in "iu":
        return True
    if operator in ("Cast", "CastLike") and read[0].dtype.kind == "f":
        return finite and _is_within(float(np.abs(read[0].astype(np.float64)).max(initial=0)), array)
    if operator in ("Div", "Mod"):
        return bool(read[1].all())
    if operator in ACCUMULATING:
        sizes = np.abs(read[0].astype(np.float64))
        return _is_within(float(np.maximum(sizes, 1).prod() if operator == "ReduceProd" else sizes.sum()), array)
    return operator not in OVERFLOWING


def _is_within(size: float, array: np.ndarray[Any, Any]) -> bool:
    return size < float(np.iinfo(array.dtype).max)


def _is_of_shape(array: np.ndarray[Any, Any], shape: ir.Shape) -> bool:
    return array.ndim == len(shape) and all(
        not isinstance(length, int) or length == own for own, length in zip(array.shape, shape, strict=True)
    )


def _is_understood(node: ir.Node, opset: int) -> bool:
    """Whether what replaces an operator is the same, and valid in this opset."""
    if is_standard(node) and node.op_type == "Abs":
        return node.inputs[0] is not None and node.inputs[0].const_value is not None  # lengths minus 5 may be negative
    if is_standard(node) and node.op_type == "Gather":
        data = node.inputs[0]  # what is picked of lengths that are no vector is no vector either
        return data is not None and (data.const_value is not None or (data.shape is not None and len(data.shape) == 1))
    if is_standard(node) and node.op_type == "CastLike" and "saturate" in node.attributes:
        return False
    if is_standard(node) and node.op_type == "SplitToSequence" and len(node.inputs) > 1:
        split = node.inputs[1]
        counted = split is not None and split.shape is not None and (split.shape.rank() == 1 or split.const_value)
        # With sizes, keepdims is ignored; Split knows a number of outputs from opset 18 on.
        return bool(counted) and opset >= 18 and int_attribute(node, "keepdims", 1) == 1
    if is_standard(node) and node.op_type == "ConcatFromSequence":
        return opset >= 13 or not int_attribute(node, "new_axis", 0)
    return True


@contextmanager
def _without_defaults(graph: ir.Graph) -> Iterator[None]:
    """Remove the defaults of inputs for a while: the caller may replace them, so they are no constants."""
    defaults = [(value, value.const_value) for value in graph.inputs if value.is_initializer()]
    for value, _ in defaults:
        graph.initializers.pop(value.name or "")
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in defaults:
            value.const_value = tensor
            graph.register_initializer(value)


def _is_parameter(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.size < 2:
        return False
    return tensor.dtype.is_floating_point() or (tensor.dtype.is_integer() and tensor.dtype.bitwidth <= 8)
