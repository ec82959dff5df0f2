"""onnx.shape_inference on a copy of a model without large weights and without defaults that a caller may replace."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import onnx
import onnx_ir as ir

SMALL = 1000
"""Largest size in bytes of a constant that inference may need to read: target shapes, axes, pads."""
LONG = 1_000_000
"""Length from which on inference does not follow what vectors hold: it takes 40 bytes and more for every element."""
UNIT = 480
"""What the numbers for symbolic axes are multiples of: strides and groups divide most of them."""

_log = logging.getLogger(__name__)


def inferred(
    model: ir.Model, *, believe: bool = True, lengths: Mapping[str | None, int] | None = None
) -> ir.Model | None:
    """A copy with what inference finds; None if it fails.

    believe: keep what the model says about the results of its nodes. lengths: numbers for the symbolic axes of inputs.
    """
    light = _light(model)
    if not believe:
        for out in (out for node in light.graph.all_nodes() for out in node.outputs):
            out.type = out.shape = None
        for value in (value for subgraph in light.graph.subgraphs() for value in subgraph.inputs):
            value.shape = None
    if lengths:
        for value in light.graph.inputs:
            if value.shape is not None:
                value.shape = ir.Shape(d if isinstance(d, int) else lengths[d.value] for d in value.shape)
    try:
        return ir.from_proto(_with_shapes(ir.to_proto(light)))
    except Exception as error:  # its errors have no common class; without it, only the given shapes are known
        _log.warning("shapes cannot be inferred: %s", error)
        return None


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inference follows the contents of vectors, from Shape to Reshape, but not where it would write long ones out."""
    shapes = onnx.shape_inference.infer_shapes(model)
    tensors = (value.type.tensor_type for value in (*shapes.graph.input, *shapes.graph.value_info))
    vectors = (tensor.shape.dim[0].dim_value for tensor in tensors if len(tensor.shape.dim) == 1)
    return shapes if max(vectors, default=0) > LONG else onnx.shape_inference.infer_shapes(model, data_prop=True)


def distinct_lengths(graph: ir.Graph) -> Mapping[str | None, int]:
    """A number for every symbolic axis of the inputs, by name."""
    axes = (d for value in graph.inputs for d in value.shape or () if not isinstance(d, int))
    return {name: UNIT * (11 + 2 * at) for at, name in enumerate(dict.fromkeys(axis.value for axis in axes))}


def _light(model: ir.Model) -> ir.Model:
    light = model.clone()
    graph = light.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if value.is_graph_input() or tensor is None or tensor.nbytes > SMALL:
            graph.initializers.pop(name)
            value.const_value = None
            if tensor is not None:
                value.type, value.shape = value.type or ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            if not value.is_graph_input():
                graph.inputs.append(value)
    return light
