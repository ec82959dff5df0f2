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
WHOLE = {name: RNG.uniform(0.5, 2, 8).astype(np.float32) for name in ("gain", "steps", "factors")}
X = RNG.standard_normal((3, 4)).astype(np.float32)

NORM = """(float[N, 4] x) => (uint8[N, 4] y, float y_scale) {
    n = Sigmoid(x)
    normed = Mul(gain, n)
    smooth = Mul(factors, normed)
    y, y_scale, y_zero = DynamicQuantizeLinear(smooth)
}"""
OPERATOR = NORM.replace("n = Sigmoid(x)", "").replace("Mul(gain, n)", "RMSNormalization<axis = -1>(x, gain)")
PRODUCT = """(float[N, 4] x) => (uint8[N, 4] y, float y_scale) {
    gate = Sigmoid(x)
    s = ReduceMax<keepdims = 0>(x)
    scales = Mul(s, steps)
    up = Mul(x, scales)
    gated = Mul(gate, up)
    smooth = Mul(gated, factors)
    y, y_scale, y_zero = DynamicQuantizeLinear(smooth)
}"""
ROUND = "y, y_scale, y_zero = DynamicQuantizeLinear(smooth)"
UNCHANGED = {
    "the norm is read elsewhere": NORM.replace(ROUND, f"{ROUND}\n y_sum = ReduceMax<keepdims = 0>(normed)").replace(
        "float y_scale", "float y_scale, float y_sum"
    ),
    "behind a sum": NORM.replace("normed = Mul(gain, n)", "normed = Add(gain, n)"),
    "not only rounded": NORM.replace(ROUND, f"{ROUND}\n y_neg = Neg(smooth)").replace(
        "float y_scale", "float y_scale, float[N, 4] y_neg"
    ),
    "an output": NORM.replace("smooth", "y_smooth").replace("float y_scale", "float y_scale, float[N, 4] y_smooth"),
}


def run(model: ir.Model) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})


def fold(text: str, **kept: np.ndarray) -> tuple[ir.Model, Derivation, list[np.ndarray]]:
    """The folded graph, and what the graph gave before."""
    axes = {name: (kept.get(name, KEPT),) for name in WHOLE if name in text}
    model = parse(text, {name: WHOLE[name][indices] for name, (indices,) in axes.items()})
    before = run(model)
    result = FoldFactors(axes, {name: Whole((8,), partial(np.asarray, WHOLE[name])) for name in axes})(model)
    assert isinstance(result, Derivation)
    check(model)
    return model, result, before


@pytest.mark.parametrize(("text", "constant"), [(NORM, "gain"), (PRODUCT, "steps"), (OPERATOR, "gain")])
def test_factors_are_folded_into_what_inputs_are_multiplied_by(text: str, constant: str) -> None:
    model, result, before = fold(text)
    numbers, scale = run(model)
    np.testing.assert_allclose(scale, before[1], rtol=1e-6)
    assert np.abs(numbers.astype(int) - before[0]).max() <= 1
    assert Counter(node.op_type for node in model.graph)["Mul"] == text.count("Mul") - 1
    (name,) = model.graph.initializers
    derived = result.parameters[name]
    np.testing.assert_array_equal(derived.whole.read(), WHOLE[constant] * WHOLE["factors"])
    assert derived.kept[0] is KEPT
    kept, whole = {name: derived.kept}, {name: derived.whole}
    assert not FoldFactors(kept, whole)(model).modified


@pytest.mark.parametrize("why", UNCHANGED)
def test_factors_stay_where_anything_else_would_change(why: str) -> None:
    model, result, before = fold(UNCHANGED[why])
    assert not result.modified and set(model.graph.initializers) == {"gain", "factors"}
    for one, other in zip(run(model), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_factors_of_other_channels_stay() -> None:
    model, result, _ = fold(NORM, gain=np.array([0, 2, 3, 6]))
    assert not result.modified and set(model.graph.initializers) == {"gain", "factors"}
