"""Weights in blocks of few bits in the operators of the standard, for TensorRT.

    x @ W   ->   x @ DequantizeLinear(numbers, scales)      both of W by block of inputs and output channel

Inputs of the product are not rounded. Tables that are looked up, and parameters whose input channels a context does not
keep in whole blocks, stay as they are.

Source: ONNX, DequantizeLinear (version 21, blocked); TensorRT developer guide, explicit quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from cpcompile.core.rounding import BLOCK, SCHEMES
from cpcompile.passes.derived_parameters import Derivation
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.opset import require_opset
from cpcompile.passes.quantize_weights import CUT, blocks_of
from cpcompile.passes.quantized_parameters import QuantizedParameters
from cpcompile.passes.share_weights import KeptChannels, Whole

FLOAT, INT4 = ir.DataType.FLOAT, ir.DataType.INT4
OPSET = 21
"""The first one with blocks and INT4."""


@dataclass(frozen=True)
class DequantizeWeights(GraphPass):
    """Store the weights of products in the 4-bit scheme `precision`; the rest as in `QuantizedParameters`."""

    precision: str
    kept: KeptChannels = field(repr=False)
    whole: Mapping[str, Whole] = field(repr=False)

    def call(self, model: ir.Model) -> Derivation:
        """Edit `model`; NothingToRoundError if it has no such weight, OpsetError if it cannot say it."""
        require_opset(model.graph, OPSET, self.precision)
        parameters = QuantizedParameters(model.graph, SCHEMES[self.precision], self.kept, self.whole)
        for node, name in parameters.products():
            if (weight := _dequantized(parameters, name)) is not None:
                product = ir.node("MatMul", [node.inputs[0], weight.outputs[0]], name=node.name)
                parameters.replace(node, [weight, product], name)
        return parameters.result(model)


def _dequantized(parameters: QuantizedParameters, name: str) -> ir.Node | None:
    """What gives the parameter (inputs, outputs) from its numbers and scales; None if its blocks are cut."""
    (inputs, outputs), kept = parameters.shape(name), parameters.kept(name)
    if inputs % BLOCK or (blocks := blocks_of(kept[0])) is CUT:
        return None
    numbers = Whole(
        (inputs, outputs),
        lambda: parameters.rounded(name).numbers.reshape(inputs, outputs).astype(INT4.numpy()),
    )
    scales = Whole((inputs // BLOCK, outputs), lambda: parameters.rounded(name).scales[:, 0])
    stored: list[ir.Value | None] = [
        parameters.add(f"{name}.int4", kept, INT4, numbers),
        parameters.add(f"{name}.scales", (blocks, kept[1]), FLOAT, scales),
    ]
    weight = ir.node("DequantizeLinear", stored, {"axis": 0, "block_size": BLOCK}, name=f"{name}.dequantized")
    weight.outputs[0].name, weight.outputs[0].type = weight.name, ir.TensorType(FLOAT)
    return weight
