"""Nano decoders with random weights and selections; each form is captured once, then given other parameters."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch

from cpcompile.core.config import preset
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.frontend.capture import capture
from cpcompile.models.decoder import Decoder

CONTEXTS = ("a", "b", "c")
FORMS = [
    pytest.param(20, 1, marks=pytest.mark.slow),
    (23, 2),
    *(pytest.param(*form, marks=pytest.mark.slow) for form in ((20, 2), (20, 4), (23, 1), (23, 4))),
]
"""Opset and heads of keys and values."""


def random_decoder(kv_heads: int, seed: int) -> Decoder:
    """Weights of deviation 0.2, so that logits are not tiny; learned scales of gates and norms that are not 1."""
    torch.manual_seed(seed)
    model = Decoder(replace(preset("nano"), kv_heads=kv_heads), contexts=len(CONTEXTS)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_gate.table", "norm.weight")):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    return model


def random_selection(model: Decoder, seed: int) -> Selection:
    """Units by chance. Context b has nothing left in the FFN of layer 0, context c no heads in layer 1."""
    rng = np.random.default_rng(seed)
    kept = {}
    for units in model.units():
        if units.kind in (UnitKind.FFN, UnitKind.HEAD):
            kept[units.kind] = rng.random((len(CONTEXTS), units.layers, units.count)) < rng.uniform(0.2, 0.8)
    kept[UnitKind.FFN][1, 0] = False
    kept[UnitKind.HEAD][2, 1] = False
    return Selection(CONTEXTS, kept)


def dynamic_graph(model: Decoder, opset: int, *, cached: bool = False) -> ir.Model:
    """What `capture` gives for `model`: the captured graph of its form with its parameters."""
    graph = _captured(opset, model.config.kv_heads, cached).clone()
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy().copy()
        graph.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return graph


@cache
def _captured(opset: int, kv_heads: int, cached: bool) -> ir.Model:
    return capture(random_decoder(kv_heads, 0), opset=opset, cached=cached)
