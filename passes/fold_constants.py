"""Compute at compile time what does not depend on the inputs; parameters stay, under their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript.optimizer._constant_folding import FoldConstantsPass

from cpcompile.passes.nodes import int_attribute
from cpcompile.passes.operators import RANDOM, is_standard


@dataclass(frozen=True)
class FoldConstants(ir.passes.InPlacePass):
    """Fold constant expressions and list operators (SplitToSequence), then make every constant an initializer.

    An expression over a parameter (a floating-point initializer that is no scalar; exporters write constants
    as Constant nodes) is folded only if it picks one entry with Gather, such as the gates of a context: a computed,
    transposed or reordered copy under a new name would be a parameter that got lost.
    """

    limit: int = 1 << 20
    """Largest result in elements."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` says whether anything folded or was lifted."""
        stored = (value for graph in model.graphs() for value in graph.initializers.values())
        parameters = {value.name for value in stored if _is_parameter(value)}

        def may_fold(node: ir.Node) -> bool | None:
            reads_parameter = any(value is not None and value.name in parameters for value in node.inputs)
            return False if node.op_type in RANDOM or (reads_parameter and not _picks_one(node)) else None

        with _without_defaults(model.graph):
            folded = _Folder(
                shape_inference=True, input_size_limit=self.limit, output_size_limit=self.limit, should_fold=may_fold
            )(model)
        lifted = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        return ir.passes.PassResult(model, modified=folded.modified or lifted.modified)


def _picks_one(node: ir.Node) -> bool:
    index = node.inputs[1] if node.op_type == "Gather" else None
    return index is not None and index.shape is not None and index.shape.rank() == 0


class _Folder(FoldConstantsPass):
    """Leaves alone what onnxscript (0.7) gets wrong."""

    def process_node(self, node: ir.Node, is_function: bool) -> Any:
        opset = self._opset_imports.get("", 0)
        return super().process_node(node, is_function) if _is_understood(node, opset) else None


def _is_understood(node: ir.Node, opset: int) -> bool:
    """Whether the replacement of a list operator is the same, and valid in this opset."""
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
    return tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1
