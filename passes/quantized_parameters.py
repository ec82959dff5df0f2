"""Rounded parameters in place of those that a graph was captured with: what both quantising passes do."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.core.errors import CpcompileError
from cpcompile.core.rounding import QUANTIZED, Rounded, Scheme
from cpcompile.passes.derived_parameters import Derivation, DerivedParameters
from cpcompile.passes.share_weights import KeptChannels, Whole


class NothingToRoundError(CpcompileError):
    """A graph has no product with a weight that a scheme could round."""


class QuantizedParameters(DerivedParameters):
    """Parameters that are rounded by one scheme."""

    def __init__(self, graph: ir.Graph, scheme: Scheme, kept: KeptChannels, whole: Mapping[str, Whole]) -> None:
        super().__init__(graph, kept, whole)
        self._scheme = scheme
        self._rounded: tuple[tuple[str, bool, bool], Rounded] | None = None

    def factors(self, name: str) -> npt.NDArray[np.float32] | None:
        """What the inputs of a product with the parameter are multiplied by before they are rounded, (inputs,)."""
        return self._scheme.factors(self.calibrated(name))

    def rounded(self, name: str, *, rows: bool = False, looked_up: bool = False) -> Rounded:
        """What the whole parameter as (inputs, outputs) is rounded to.

        rows: it lies as (outputs, inputs). looked_up: as in `Scheme.rounded`.
        """
        key = (name, rows, looked_up)
        if self._rounded is None or self._rounded[0] != key:  # its numbers and its scales are written one by one
            whole = self.read(name)
            weight = whole.T if rows else whole
            self._rounded = key, self._scheme.rounded(weight, self.calibrated(name), looked_up=looked_up)
        return self._rounded[1]

    def result(self, model: ir.Model) -> Derivation:
        """Drop parameters that nothing reads any more, and record the others; NothingToRoundError without any."""
        if not self.replaced:
            blocks = f" in blocks of {self._scheme.block} input channels" if self._scheme.block else ""
            raise NothingToRoundError(f"it has no product with a weight that {self._scheme.name} could round{blocks}")
        self.drop_unread()
        known = json.loads(model.metadata_props.get(QUANTIZED, "{}"))
        model.metadata_props[QUANTIZED] = json.dumps(known | dict.fromkeys(self.replaced, self._scheme.name))
        return Derivation(model, True, self.derived)
