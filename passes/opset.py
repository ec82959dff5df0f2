"""The lowest opset that a pass accepts, checked before the pass runs."""

from __future__ import annotations

import onnx_ir as ir

from cpcompile.core.errors import CpcompileError
from cpcompile.files.onnx_file import opset_of
from cpcompile.passes.graph_pass import GraphPass

MIN_OPSET = 13
"""The first opset whose operators are understood: before it, axes were attributes and Softmax flattened."""


class OpsetError(ir.passes.PreconditionError, CpcompileError):
    """The model is in an older opset than is needed, and is left as it was."""


def require_opset(graph: ir.Graph, minimum: int, what: str) -> None:
    """Raise OpsetError if `graph` is in an older opset than `what` needs."""
    if (opset := opset_of(graph)) < minimum:
        found = f"the model is in opset {opset}" if opset else "the model names no opset of ONNX"
        raise OpsetError(
            f"{what} needs opset {minimum} or later, and {found}; convert it first, for example with "
            "onnx.version_converter.convert_version"
        )


class MinOpsetPass(GraphPass):
    """A pass for models from `MIN_OPSET` on; it has the name of its module."""

    def requires(self, model: ir.Model) -> None:
        """Raise OpsetError for an older model."""
        require_opset(model.graph, MIN_OPSET, f"the pass {type(self).__module__.rpartition('.')[2]}")
