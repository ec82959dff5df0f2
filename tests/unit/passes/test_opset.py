"""Every pass that needs an opset refuses an older model in one sentence, and leaves it as it was."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.core.errors import CpcompileError
from cpcompile.passes.opset import MinOpsetPass, OpsetError
from cpcompile.pipeline.optimize import PASSES
from tests.unit.passes.graph_text import parse

NEEDED = {"trim_vocabulary": {"kept": (0, 1)}}
DEMANDING = [name for name, kind in PASSES.items() if issubclass(kind, MinOpsetPass)]
TEXT = "(float[N,4] x) => (float[N,4] y) { m = Mul(x, gate) s = Add(x, m) y = Relu(s) }"


def test_the_passes_that_read_shapes_and_channels_need_an_opset() -> None:
    assert set(DEMANDING) == {
        *("canonicalize_shapes", "prune_experts", "eliminate_dead_channels"),
        *("remove_empty_layers", "fold_gates", "trim_vocabulary"),
    }


@pytest.mark.parametrize("name", DEMANDING)
def test_an_older_model_is_refused_and_stays(name: str) -> None:
    model = parse(TEXT, {"gate": np.zeros(4)}, opset=12)
    before = ir.to_proto(model)
    says = f"^the pass {name} needs opset 13 or later, and the model is in opset 12; convert it first"
    with pytest.raises(OpsetError, match=says) as raised:
        PASSES[name](**NEEDED.get(name, {}))(model)
    assert isinstance(raised.value, CpcompileError)
    assert isinstance(raised.value, ir.passes.PreconditionError)
    assert ir.to_proto(model) == before


@pytest.mark.parametrize("name", [name for name in DEMANDING if name not in NEEDED])
def test_opset_13_is_enough(name: str) -> None:
    PASSES[name]()(parse(TEXT, {"gate": np.zeros(4)}, opset=13))


def test_a_model_without_an_opset_is_refused() -> None:
    model = parse(TEXT, {"gate": np.zeros(4)}, opset=13)
    del model.graph.opset_imports[""]
    with pytest.raises(OpsetError, match="the model names no opset of ONNX"):
        PASSES["fold_gates"]()(model)
