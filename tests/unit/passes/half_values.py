"""What an engine with half-precision tensors and float32 sums computes, by the standard's reference implementation.

ONNX Runtime's CPU takes pairs of Casts out of such graphs and has no bfloat16, so it shows neither. Here every operator
computes in float32, and every tensor of half precision is rounded to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[Any]
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOAT = ir.DataType.FLOAT


def run_rounded(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name."""
    graph = (model := model.clone()).graph
    for value in list(graph.initializers.values()):
        if value.dtype in HALF:
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.type = ir.TensorType(FLOAT)
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() in HALF:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT.value)
        for out in node.outputs:
            if (half := out.dtype) not in HALF:
                continue
            out.type = ir.TensorType(FLOAT)
            down = ir.node("Cast", [out], {"to": half.value})
            up = ir.node("Cast", [down.outputs[0]], {"to": FLOAT.value})
            ir.convenience.replace_all_uses_with(out, up.outputs[0], replace_graph_outputs=True)
            down.replace_input_with(0, out)
            graph.insert_after(node, [down, up])
    names = [out.name for out in graph.outputs]
    return dict(zip(names, ReferenceEvaluator(ir.to_proto(model)).run(names, dict(feeds)), strict=True))
