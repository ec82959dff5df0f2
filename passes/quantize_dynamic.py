"""Products of 8-bit integers: weights rounded when the engine is built, their inputs when it runs.

    x @ W   ->   (round(x / a) @ round(W / b)) * a * b      a: one number for all of x      b: one per output channel
                 with x * f for x, W / f for W              f: one per input channel, where a calibration has it
    E[ids]  ->   round(E / c)[ids] * c[ids]                 c: one per row

ONNX Runtime fuses each product into one or two operators of its own. Products with the same input round it once. The
scale of x depends on all tokens that are computed together, so logits depend a little on what else is in a batch, and
on how many tokens a call has.

Source: ONNX, DynamicQuantizeLinear and MatMulInteger; arXiv 2004.09602 for scales per channel, 2211.10438 for factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from cpcompile.core.rounding import SCHEMES, Rounded
from cpcompile.core.types import Array
from cpcompile.passes.derived_parameters import Derivation, Lookup
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.quantized_parameters import QuantizedParameters
from cpcompile.passes.share_weights import KeptChannels, Whole

FLOAT, INT8, UINT8, INT32 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32


@dataclass(frozen=True)
class QuantizeDynamic(GraphPass):
    """Compute products with parameters in the scheme `precision`; the rest as in `QuantizedParameters`."""

    precision: str
    kept: KeptChannels = field(repr=False)
    whole: Mapping[str, Whole] = field(repr=False)

    def call(self, model: ir.Model) -> Derivation:
        """Edit `model`; NothingToRoundError if it has no such product."""
        parameters = QuantizedParameters(model.graph, SCHEMES[self.precision], self.kept, self.whole)
        inputs: dict[tuple[ir.Value | None, bytes], list[ir.Value]] = {}
        for node, name in parameters.products():
            factors = parameters.factors(name)
            key = node.inputs[0], b"" if factors is None else factors.tobytes()
            if key not in inputs:
                inputs[key] = _round_input(model.graph, parameters, node, name, factors)
            _multiply(parameters, node, name, *inputs[key])
        for lookup, name in parameters.lookups():
            _look_up(parameters, lookup, name)
        return parameters.result(model)


def _round_input(
    graph: ir.Graph, parameters: QuantizedParameters, node: ir.Node, name: str, factors: Array | None
) -> list[ir.Value]:
    """The integers, their scale and their zero, in front of the product `node` with the parameter `name`."""
    x, nodes = node.inputs[0], []
    assert x is not None
    if factors is not None:
        own = parameters.add(f"{name}.factors", parameters.kept(name)[:1], FLOAT, Whole(factors.shape, lambda: factors))
        nodes.append(_node("Mul", [x, own], f"{node.outputs[0].name}.smooth", FLOAT))
        nodes[0].outputs[0].shape = x.shape
        x = nodes[0].outputs[0]
    nodes.append(_node("DynamicQuantizeLinear", [x], f"{x.name}.int8", UINT8, FLOAT, UINT8))
    for each in nodes:
        each.metadata_props.update(node.metadata_props)
    graph.insert_before(node, nodes)
    return list(nodes[-1].outputs)


def _multiply(
    parameters: QuantizedParameters, node: ir.Node, name: str, x: ir.Value, x_scale: ir.Value, x_zero: ir.Value
) -> None:
    """A product of integers in place of `node`, whose weight is the parameter `name`."""
    kept, out = parameters.kept(name), node.outputs[0].name
    inputs, outputs = parameters.shape(name)
    numbers = Whole((inputs, outputs), lambda: parameters.rounded(name).numbers[0])
    each = Whole((outputs,), lambda: parameters.rounded(name).scales[0, 0])
    weight = parameters.add(f"{name}.int8", kept, INT8, numbers)
    scale = parameters.add(f"{name}.scale", kept[1:], FLOAT, each)
    product = _node("MatMulInteger", [x, weight, x_zero], f"{out}.integers", INT32)
    real = _node("Cast", [product.outputs[0]], f"{out}.real", FLOAT, to=FLOAT.value)
    scales = _node("Mul", [x_scale, scale], f"{out}.scale", FLOAT)
    result = _node("Mul", [real.outputs[0], scales.outputs[0]], f"{out}.scaled", FLOAT)
    parameters.replace(node, [product, real, scales, result], name)


def _look_up(parameters: QuantizedParameters, lookup: Lookup, name: str) -> None:
    """Rows of integers and their scales, in place of the rows of the parameter `name`."""
    kept, shape, lies_in_rows = parameters.kept(name), parameters.shape(name), not lookup.columns
    if lookup.columns:
        kept, shape = kept[::-1], shape[::-1]

    def rounded() -> Rounded:
        return parameters.rounded(name, rows=lies_in_rows, looked_up=True)

    numbers = Whole(shape, lambda: rounded().numbers[0].T)
    each = Whole((shape[0], 1), lambda: rounded().scales[0].T)
    table = parameters.add(f"{name}.rows.int8", kept, INT8, numbers)
    scale = parameters.add(f"{name}.rows.scale", (kept[0], None), FLOAT, each)
    ids, out = lookup.node.inputs[1], lookup.last.outputs[0].name
    found = _node("Gather", [table, ids], f"{out}.integers", INT8)
    scales = _node("Gather", [scale, ids], f"{out}.scales", FLOAT)
    real = _node("Cast", [found.outputs[0]], f"{out}.real", FLOAT, to=FLOAT.value)
    result = _node("Mul", [real.outputs[0], scales.outputs[0]], f"{out}.scaled", FLOAT)
    parameters.replace(lookup.last, [found, scales, real, result], name, first=lookup.node)


def _node(operator: str, inputs: list[ir.Value | None], name: str, *types: ir.DataType, **attributes: int) -> ir.Node:
    """A node whose outputs are called after `name`, and have those types."""
    node = ir.node(operator, inputs, attributes, num_outputs=len(types), name=name)
    for index, (output, dtype) in enumerate(zip(node.outputs, types, strict=True)):
        output.name, output.type = f"{name}.{index}" if index else name, ir.TensorType(dtype)
    return node
