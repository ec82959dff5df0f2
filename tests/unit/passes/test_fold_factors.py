"""Factors of inputs: folded into gains and scales with the same results, and left where anything else would change."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cpcompile.passes.derived_parameters import Derivation
from cpcompile.passes.fold_factors import FoldFactors
from cpcompile.passes.share_weights import Whole
from tests.unit.passes.graph_text import check, parse

RNG = np.random.default_rng(0)
KEPT = np.array([0, 2, 3, 7])
WHOLE = {name: RNG.uniform(0.5, 2, 8).astype(np.float32) for name in ("gain", "scale", "factors")}
X = RNG.standard_normal((3, 4)).astype(np.float32)

NORM = """(float[N, 4] x) => (float[N, 4] y) {
    n = Sigmoid(x)
    normed = Mul(gain, n)
    smooth = Mul(normed, factors)
    y = Neg(smooth)
}"""
PRODUCT = """(float[N, 4] x) => (float[N, 4] y) {
    gate = Sigmoid(x)
    s = ReduceMax<keepdims = 0>(x)
    scales = Mul(s, scale)
    up = Mul(x, scales)
    gated = Mul(gate, up)
    smooth = Mul(gated, factors)
    y = Neg(smooth)
}"""
READ_TWICE = NORM.replace("y = Neg(smooth)", "y = Add(smooth, normed)")
BEHIND_A_SUM = NORM.replace("normed = Mul(gain, n)", "normed = Add(gain, n)")


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def fold(text: str, **kept: np.ndarray) -> tuple[ir.Model, Derivation, np.ndarray]:
    """The folded graph, and what the graph gave before."""
    axes = {name: (kept.get(name, KEPT),) for name in WHOLE if name in text}
    model = parse(text, {name: WHOLE[name][indices] for name, (indices,) in axes.items()})
    before = run(model)
    result = FoldFactors(axes, {name: Whole((8,), partial(np.asarray, WHOLE[name])) for name in axes})(model)
    assert isinstance(result, Derivation)
    check(model)
    return model, result, before


@pytest.mark.parametrize(("text", "constant"), [(NORM, "gain"), (PRODUCT, "scale")])
def test_factors_are_folded_into_what_inputs_are_multiplied_by(text: str, constant: str) -> None:
    model, result, before = fold(text)
    np.testing.assert_allclose(run(model), before, rtol=1e-6)
    assert Counter(node.op_type for node in model.graph)["Mul"] == text.count("Mul") - 1
    (name,) = model.graph.initializers
    derived = result.parameters[name]
    np.testing.assert_array_equal(derived.whole.read(), WHOLE[constant] * WHOLE["factors"])
    assert derived.kept[0] is KEPT


@pytest.mark.parametrize("text", [READ_TWICE, BEHIND_A_SUM])
def test_factors_stay_where_anything_else_would_change(text: str) -> None:
    model, result, before = fold(text)
    assert not result.modified and set(model.graph.initializers) == {"gain", "factors"}
    np.testing.assert_array_equal(run(model), before)


def test_factors_of_other_channels_stay() -> None:
    model, result, _ = fold(NORM, gain=np.array([0, 2, 3, 6]))
    assert not result.modified and set(model.graph.initializers) == {"gain", "factors"}
