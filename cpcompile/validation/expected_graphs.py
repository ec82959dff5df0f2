"""Fresh graphs of the model, to compare an engine with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.core.rounding import Calibration, Rounded
from cpcompile.core.selection import UnitKind
from cpcompile.frontend.source import Source
from cpcompile.passes.bind_context import BindContext
from cpcompile.passes.freeze import freeze
from cpcompile.passes.strip_metadata import StripMetadata
from cpcompile.passes.trim_vocabulary import TrimVocabulary, renumber_interface


@dataclass(frozen=True)
class FreshGraphs:
    """What the engines of `source` should compute; `cpcompile.validation.diagnosis.Graphs`.

    dynamic: opset -> the graph of all contexts. tokens: context -> the rows of its vocabulary that an engine has, in
    the engine's order, if its vocabulary is trimmed.
    """

    source: Source
    dynamic: Callable[[int], ir.Model]
    tokens: Mapping[str, npt.NDArray[np.int64]]

    def frozen(self, context: str, opset: int) -> ir.Model:
        model, rows = self._ordered(context, opset)
        return freeze(model, self.source.contexts.index(context), range(rows) if rows else None).model

    def bound(self, context: str, opset: int) -> ir.Model:
        model, rows = self._ordered(context, opset)
        for each in (BindContext(self.source.contexts.index(context)), StripMetadata()):
            each(model)
        if rows:
            renumber_interface(model, TrimVocabulary(tuple(range(rows))))
        return model

    def _ordered(self, context: str, opset: int) -> tuple[ir.Model, int]:
        """A copy with the tokens of `context` first, and how many there are; 0 if it has all."""
        model = self.dynamic(opset).clone()
        if (tokens := self.tokens.get(context)) is None:
            return model, 0
        order_rows(model, self.source, tokens)
        return model, len(tokens)


def order_rows(model: ir.Model, source: Source, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bring the vocabulary of `model` into `order`, what is not in it last; returns where each old token is now."""
    whole = order
    for name, value in model.graph.initializers.items():
        if source.parameter_kind(name) is UnitKind.VOCABULARY and value.const_value is not None:
            table = value.const_value.numpy()
            whole = np.concatenate([order, np.setdiff1d(np.arange(len(table)), order)])
            value.const_value = ir.tensor(table[whole], name=name)
    return np.argsort(whole)


def order_calibration(calibration: Calibration, source: Source, rows: npt.NDArray[np.int64]) -> Calibration:
    """The `calibration` of `source` for parameters whose tokens `order_rows` brought to `rows`."""
    order = np.argsort(rows)
    return {
        name: {
            scheme: Rounded(numbers[..., order], scales[..., order], factors)
            for scheme, (numbers, scales, factors) in calibrated.items()
        }
        if source.parameter_kind(name) is UnitKind.VOCABULARY
        else calibrated
        for name, calibrated in calibration.items()
    }
