"""Factors of a product's inputs, multiplied into constants that those inputs are multiplied by anyway.

    Mul(Mul(n, w), f)                         ->   Mul(n, w * f)                          the gain of a norm
    Mul(RMSNormalization(x, w), f)            ->   RMSNormalization(x, w * f)
    Mul(Mul(a, Mul(y, Mul(s, w))), f)         ->   Mul(a, Mul(y, Mul(s, w * f)))          the scales of a product before

f is what QuantizeDynamic multiplies the inputs of a product by before it rounds them, where a calibration says so. The
multiplications in between have to be read by nothing else.

Source: arXiv 2211.10438, section 4; ONNX operator RMSNormalization-23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.derived_parameters import Derivation, DerivedParameters
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import both_orders, constant_of, made_by
from cpcompile.passes.share_weights import KeptChannels, Whole


@dataclass(frozen=True)
class FoldFactors(GraphPass):
    """Fold the factors of inputs that are rounded; `kept` and `whole` as in `DerivedParameters`."""

    kept: KeptChannels = field(repr=False)
    whole: Mapping[str, Whole] = field(repr=False)

    def call(self, model: ir.Model) -> Derivation:
        """Edit `model`; `modified` says whether anything was folded."""
        parameters = DerivedParameters(model.graph, self.kept, self.whole)
        for node in list(model.graph):
            if made_by(node.outputs[0], "Mul") is None or not _is_rounded(node.outputs[0]):
                continue
            for x, factors in both_orders(node):
                target = self._target(x, factors) if self._is_per_channel(factors) else None
                if target is not None:
                    _fold(parameters, factors, *target)
                    ir.convenience.replace_all_uses_with(node.outputs[0], x)
                    model.graph.remove(node, safe=True)
                    break
        parameters.drop_unread()
        return Derivation(model, bool(parameters.replaced), parameters.derived)

    def _is_per_channel(self, value: ir.Value) -> bool:
        tensor = constant_of(value)
        is_float = tensor is not None and tensor.dtype == ir.DataType.FLOAT
        return is_float and len(self.kept.get(value.name or "", ())) == 1

    def _target(self, value: ir.Value, factors: ir.Value) -> tuple[ir.Node, ir.Value] | None:
        """The node that `value` comes from, or one before it, and the constant in it that can take the factors."""
        node = made_by(value, "Mul", "RMSNormalization")
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return None
        operands = [each for each in node.inputs if each is not None]
        for each in operands:
            if self._is_per_channel(each) and self._same_channels(each, factors):
                return node, each
        if node.op_type == "RMSNormalization":
            return None
        return next((found for each in operands if (found := self._target(each, factors)) is not None), None)

    def _same_channels(self, one: ir.Value, other: ir.Value) -> bool:
        assert one.name is not None and other.name is not None
        (first,), (second,) = self.kept[one.name], self.kept[other.name]
        return self.whole[one.name].shape == self.whole[other.name].shape and (
            first is second if first is None or second is None else np.array_equal(first, second)
        )


def _is_rounded(value: ir.Value) -> bool:
    """Whether `value` is only read in order to be rounded, as QuantizeDynamic does with the inputs of products."""
    readers = [reader for reader, _ in value.uses()]
    return (
        bool(readers)
        and not value.is_graph_output()
        and all(each.op_type == "DynamicQuantizeLinear" for each in readers)
    )


def _fold(parameters: DerivedParameters, factors: ir.Value, node: ir.Node, constant: ir.Value) -> None:
    """Let `node` multiply by constant * factors instead of by `constant`."""
    assert constant.name is not None and factors.name is not None
    names = constant.name, factors.name
    whole = Whole(parameters.shape(constant.name), partial(_product, parameters, *names))
    folded = parameters.add(" * ".join(names), parameters.kept(constant.name), ir.DataType.FLOAT, whole)
    node.replace_input_with(list(node.inputs).index(constant), folded)
    parameters.replaced |= dict.fromkeys(names)


def _product(parameters: DerivedParameters, one: str, other: str) -> npt.NDArray[np.generic]:
    first: npt.NDArray[np.float32] = parameters.read(one).astype(np.float32)
    return first * parameters.read(other).astype(np.float32)
