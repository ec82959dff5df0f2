"""Weights in blocks of 8 or 4 bits, in the operators that ONNX Runtime has for them.

    x @ W   ->   MatMulNBits(x, numbers, scales)                    both of W by output channel and block of inputs
    E[ids]  ->   GatherBlockQuantized(numbers, ids, scales)         the same numbers, if E is the weight of the head

A parameter whose input channels a context does not keep in whole blocks stays as it is.

Source: ONNX Runtime, docs/ContribOperators (MatMulNBits, GatherBlockQuantized).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.core.rounding import BLOCK, SCHEMES, Scheme
from cpcompile.passes.derived_parameters import Axes, Derivation, Lookup
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import add_constant
from cpcompile.passes.quantized_parameters import QuantizedParameters
from cpcompile.passes.share_weights import KeptChannels, Whole

DOMAIN = "com.microsoft"
INTEGER_INPUTS = 4
"""The accuracy level of MatMulNBits that rounds blocks of inputs to 8 bits; the others are slow with 8-bit weights."""
FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


@dataclass(frozen=True)
class QuantizeWeights(GraphPass):
    """Store the weights of products and tables in the scheme `precision`; the rest as in `QuantizedParameters`."""

    precision: str
    kept: KeptChannels = field(repr=False)
    whole: Mapping[str, Whole] = field(repr=False)

    def call(self, model: ir.Model) -> Derivation:
        """Edit `model`; NothingToRoundError if it has no such weight."""
        scheme = SCHEMES[self.precision]
        parameters = QuantizedParameters(model.graph, scheme, self.kept, self.whole)
        for node, name in parameters.products():
            stored = _stored(parameters, name, scheme, rows=False)
            if stored is not None:
                inputs, outputs = node.inputs[1].shape.numpy()  # type: ignore[union-attr]
                product = ir.node(
                    "MatMulNBits",
                    [node.inputs[0], *stored],
                    {
                        "K": inputs,
                        "N": outputs,
                        "bits": scheme.bits,
                        "block_size": BLOCK,
                        "accuracy_level": INTEGER_INPUTS,
                    },
                    domain=DOMAIN,
                    name=node.name,
                )
                parameters.replace(node, [product], name)
        for lookup, name in parameters.lookups():
            stored = _stored(parameters, name, scheme, rows=not lookup.columns)
            if stored is not None:
                parameters.replace(
                    lookup.last, _look_up(model.graph, lookup, stored, scheme.bits), name, first=lookup.node
                )
        model.graph.opset_imports[DOMAIN] = 1
        return parameters.result(model)


def _look_up(graph: ir.Graph, lookup: Lookup, stored: tuple[ir.Value, ir.Value], bits: int) -> list[ir.Node]:
    """Rows (…, blocks, block) of integers with their scales, and then (…, channels)."""
    numbers, scales = stored
    out, rank = lookup.last.outputs[0].name, lookup.last.outputs[0].shape.rank()  # type: ignore[union-attr]
    axis = add_constant(graph, f"{out}.axis", np.array([2]))
    shape = add_constant(graph, f"{out}.shape", np.array([0] * (rank - 1) + [-1]))
    each = ir.node("Unsqueeze", [scales, axis], name=f"{out}.scales")
    found = ir.node(
        "GatherBlockQuantized",
        [numbers, lookup.node.inputs[1], each.outputs[0]],
        {"gather_axis": 0, "quantize_axis": 2, "block_size": BLOCK, "bits": bits},
        domain=DOMAIN,
        name=f"{out}.blocks",
    )
    whole = ir.node("Reshape", [found.outputs[0], shape], name=f"{out}.rows")
    nodes = [each, found, whole]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(FLOAT)
    return nodes


def _stored(
    parameters: QuantizedParameters, name: str, scheme: Scheme, *, rows: bool
) -> tuple[ir.Value, ir.Value] | None:
    """Numbers (outputs, blocks, bytes) and scales (outputs, blocks) of a parameter; None if its blocks are cut."""
    kept, shape = parameters.kept(name), parameters.shape(name)
    if rows:
        kept, shape = kept[::-1], shape[::-1]
    inputs, outputs = shape
    blocks = blocks_of(kept[0])
    if not scheme.fits(inputs) or blocks is CUT:
        return None
    bits, count, size = scheme.bits, inputs // BLOCK, BLOCK * scheme.bits // 8
    own: Axes = (kept[1], blocks)
    numbers = Whole((outputs, count, size), lambda: _packed(parameters.rounded(name, rows=rows).numbers, bits))
    scales = Whole((outputs, count), lambda: parameters.rounded(name, rows=rows).scales[:, 0].T)
    return (
        parameters.add(f"{name}.int{bits}", (*own, None), UINT8, numbers),
        parameters.add(f"{name}.scales", own, FLOAT, scales),
    )


CUT = np.zeros(0, dtype=np.intp)
"""In place of the blocks that are kept, where some are kept in part."""


def blocks_of(channels: npt.NDArray[np.intp] | None) -> npt.NDArray[np.intp] | None:
    """The blocks of kept input channels; None for all, CUT if they do not consist of whole ones."""
    if channels is None:
        return None
    if len(channels) % BLOCK:
        return CUT
    starts = channels[::BLOCK]
    whole = (starts[:, None] + np.arange(BLOCK)).reshape(-1)
    return starts // BLOCK if not (starts % BLOCK).any() and np.array_equal(whole, channels) else CUT


def _packed(numbers: npt.NDArray[np.int8], bits: int) -> npt.NDArray[Any]:
    """Signed numbers (blocks, block, outputs) as the operators read them: unsigned, (outputs, blocks, bytes)."""
    shifted = numbers.astype(np.int16) + 2 ** (bits - 1)
    unsigned: npt.NDArray[Any] = shifted.transpose(2, 0, 1).astype(np.uint8)
    return unsigned if bits == 8 else unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
