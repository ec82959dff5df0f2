"""Compute at compile time what does not depend on the inputs; parameters stay, under their names."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript.optimizer._constant_folding import FoldConstantsPass


@dataclass(frozen=True)
class FoldConstants(ir.passes.InPlacePass):
    """Fold constant expressions and list operators (SplitToSequence), then make every constant an initializer.

    An expression over a parameter (a floating-point initializer that is no scalar; exporters write constants
    as Constant nodes) folds only if it picks from it with Gather: a computed or transposed copy
    under a new name would be a parameter that got lost.
    """

    limit: int = 1 << 20
    """Largest result in elements."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` says whether anything folded or was lifted."""
        parameters = {name for name, value in model.graph.initializers.items() if _is_parameter(value)}

        def may_fold(node: ir.Node) -> bool | None:
            reads_parameter = any(value is not None and value.name in parameters for value in node.inputs)
            return False if reads_parameter and node.op_type != "Gather" else None

        folded = FoldConstantsPass(
            shape_inference=True, input_size_limit=self.limit, output_size_limit=self.limit, should_fold=may_fold
        )(model)
        lifted = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        return ir.passes.PassResult(model, modified=folded.modified or lifted.modified)


def _is_parameter(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1
