"""Make the context a constant: the first step from the graph of all contexts to the graph of one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.passes.graph_pass import GraphPass


@dataclass(frozen=True)
class BindContext(GraphPass):
    """Replace the graph input `name` (an integer scalar) by the constant `context`.

    Without such an input the graph is left as it is; an input that is no integer scalar is an error.
    """

    context: int
    name: str = "context"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` says whether the input was there."""
        graph = model.graph
        value = next((v for v in graph.inputs if v.name == self.name), None)
        if value is None:
            return ir.passes.PassResult(model, modified=False)
        if value.dtype is None or not value.dtype.is_integer() or value.shape is None or value.shape.rank() != 0:
            raise CpcompileError(
                f"graph input {self.name!r} is {value.dtype} of shape {value.shape}; a context is an integer scalar"
            )
        _require_row(value, self.context)
        graph.inputs.remove(value)
        value.const_value = ir.tensor(np.asarray(self.context, dtype=value.dtype.numpy()), name=self.name)
        graph.register_initializer(value)
        return ir.passes.PassResult(model, modified=True)


def _require_row(value: ir.Value, context: int) -> None:
    """Raise UsageError if a table from which the context picks a row does not have that row."""
    for node, index in value.uses():
        table = node.inputs[0]
        if node.op_type != "Gather" or index != 1 or table is None or table.shape is None:
            continue
        attribute = node.attributes.get("axis")
        rows = table.shape[attribute.as_int() if attribute is not None else 0]
        if isinstance(rows, int) and not 0 <= context < rows:
            raise UsageError(f"context {context}: {table.name} has the contexts 0 to {rows - 1}; choose one of them")
