"""Graphs as ONNX text, run before and after a pass; captured decoders, once per session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from cpcompile.core.config import ModelConfig, preset
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.frontend.capture import capture
from cpcompile.models.decoder import Decoder
from tests.unit.passes import graph_text

Array = npt.NDArray[Any]
CONTEXTS = ("random", "no-ffn-in-0", "no-heads-in-1", "nothing")


class Graphs:
    """What every test of a pass does with a graph, by the helpers of `graph_text`."""

    run = staticmethod(graph_text.run)
    check = staticmethod(graph_text.check)

    @staticmethod
    def build(text: str, *, opset: int = 20, infer: bool = True, **initializers: Array) -> ir.Model:
        """A model from the text of its graph."""
        return graph_text.parse(text, initializers, opset=opset, infer=infer)

    @staticmethod
    def shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
        """Shapes of the floating-point initializers."""
        return {
            name: tuple(value.const_value.shape.numpy())
            for name, value in model.graph.initializers.items()
            if value.const_value is not None and value.const_value.dtype.is_floating_point()
        }

    @staticmethod
    def operators(model: ir.Model) -> list[str]:
        return [node.op_type for node in model.graph]

    @staticmethod
    def assert_same(before: ir.Model, after: ir.Model, feeds: Mapping[str, Array], tolerance: float) -> None:
        """Same outputs by name, shape and value; the tolerance is relative to the largest value."""
        graph_text.assert_same_values(before, after, feeds, tolerance=tolerance)


@pytest.fixture(scope="session")
def graphs() -> Graphs:
    return Graphs()


@dataclasses.dataclass(frozen=True)
class Captured:
    """A gated decoder with random weights, its dynamic graph, and what its contexts keep."""

    config: ModelConfig
    model: ir.Model
    selection: Selection

    def kept(self, context: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """(layers, units) of the FFN and of the heads."""
        row = self.selection.row(CONTEXTS[context])
        return row[UnitKind.FFN], row[UnitKind.HEAD]


@pytest.fixture(scope="session")
def captured() -> Callable[[int, bool], Captured]:
    """captured(opset, grouped): captured at the first call, then the same object."""
    cache: dict[tuple[int, bool], Captured] = {}

    def get(opset: int, grouped: bool) -> Captured:
        if (opset, grouped) not in cache:
            cache[opset, grouped] = _capture(opset, grouped)
        return cache[opset, grouped]

    return get


def _capture(opset: int, grouped: bool) -> Captured:
    config = preset("nano") if grouped else dataclasses.replace(preset("nano"), kv_heads=preset("nano").heads)
    rng = np.random.default_rng(7)
    ffn = rng.random((len(CONTEXTS), config.layers, config.ffn // config.align)) < 0.3
    heads = rng.random((len(CONTEXTS), config.layers, config.kv_heads)) < 0.5
    ffn[:, :, 0] = heads[:, :, -1] = True
    ffn[1, 0] = heads[2, 1] = False
    ffn[3] = heads[3] = False
    selection = Selection(CONTEXTS, {UnitKind.FFN: ffn, UnitKind.HEAD: heads})
    torch.manual_seed(3)
    model = Decoder(config, contexts=len(CONTEXTS)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".table", "norm.weight")):
                parameter.uniform_(0.5, 1.5)  # learned scales: a gate that stays is not 1
            else:
                parameter.normal_(0, 0.15)
    model.select(selection)
    return Captured(config, capture(model, opset=opset), selection)
