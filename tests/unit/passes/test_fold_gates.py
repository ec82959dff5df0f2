"""Scales fold into the weight that reads or makes them, to rounding; where they cannot, the reason is told."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from cpcompile.passes.fold_gates import FoldGates, Folding
from cpcompile.passes.freeze import freeze
from cpcompile.passes.opset import OpsetError
from tests.unit.passes.decoders import dynamic_graph, random_decoder, random_selection
from tests.unit.passes.graph_text import Array, Weights, assert_same_values, canonical, parse, run, tensor

RNG = np.random.default_rng(0)
GATE = RNG.uniform(0.5, 1.5, 4).astype(np.float32)


def fold(before: str, weights: Weights, *, opset: int = 23) -> Folding:
    """What the pass makes of `before`, checked: values to 1e-6 of the largest, valid, nothing left for a second run."""
    original = parse(before, weights, opset=opset)
    result = FoldGates()(parse(before, weights, opset=opset))
    assert isinstance(result, Folding)
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert_same_values(original, result.model)
    again = FoldGates()(result.model)
    assert isinstance(again, Folding)
    assert (again.modified, again.folded, again.refused) == (False, (), result.refused)
    return result


@pytest.mark.parametrize(
    ("body", "expected", "shape", "factors"),
    [
        # into the next weight
        ("r = Relu(x) m = Mul(r, g) y = MatMul(m, w)", "r = Relu(x) y = MatMul(r, w)", (4, 4), GATE[:, None]),
        ("r = Relu(x) m = Mul(g, r) y = MatMul(m, w)", "r = Relu(x) y = MatMul(r, w)", (4, 4), GATE[:, None]),
        ("r = Relu(x) m = Mul(r, g) y = MatMul(m, w)", "r = Relu(x) y = MatMul(r, w)", (2, 4, 4), GATE[:, None]),
        ("m = Mul(x, g) y = Gemm(m, w)", "y = Gemm(x, w)", (4, 4), GATE[:, None]),
        (
            "m = Mul(x, g) y = Gemm <alpha = 0.5, transB = 1> (m, w)",
            "y = Gemm <alpha = 0.5, transB = 1> (x, w)",
            (4, 4),
            GATE,
        ),
        ("m = Mul(x, g) y = Gemm <transA = 1> (w, m)", "y = Gemm <transA = 1> (w, x)", (4, 4), None),
        ("t = Transpose(x) m = Mul(t, column) y = MatMul(w, m)", "t = Transpose(x) y = MatMul(w, t)", (4, 4), GATE),
        # into the weight before
        ("a = MatMul(x, w) m = Mul(a, g) y = Relu(m)", "a = MatMul(x, w) y = Relu(a)", (4, 4), GATE),
        ("a = MatMul(x, w) y = Mul(a, g)", "y = MatMul(x, w)", (4, 4), GATE),
        ("a = Gemm <transB = 1> (x, w) y = Mul(a, g)", "y = Gemm <transB = 1> (x, w)", (4, 4), GATE[:, None]),
        (
            "t = Transpose(x) a = MatMul(w, t) m = Mul(a, column) y = Relu(m)",
            "t = Transpose(x) a = MatMul(w, t) y = Relu(a)",
            (4, 4),
            GATE[:, None],
        ),
        # one after the other
        ("m = Mul(x, g) n = Mul(m, g) y = MatMul(n, w)", "y = MatMul(x, w)", (4, 4), GATE[:, None] ** 2),
        ("a = MatMul(x, w) m = Mul(a, g) n = Mul(m, g) y = Abs(n)", "a = MatMul(x, w) y = Abs(a)", (4, 4), GATE**2),
    ],
)
def test_a_scale_becomes_part_of_the_weight(
    body: str, expected: str, shape: tuple[int, ...], factors: Array | None
) -> None:
    """`w` keeps its name and holds the products; the gate is gone."""
    rank = 3 if len(shape) == 3 else 2
    head = f"(float[4,4] x) => (float[{'2,' * (rank - 2)}4,4] y)"
    weights: dict[str, Array] = {"w": RNG.standard_normal(shape).astype(np.float32), "g": GATE}
    if "column" in body:
        weights["column"] = weights.pop("g")[:, None]
    before = f"{head} {{ {body} }}"
    if factors is None:  # W' diag(columns) does not scale what Gemm contracts: the scale stays
        result = fold(before, weights)
        assert not result.modified
        assert result.refused == (
            ("m", "after it, the weight has no such axis; before it, it is an input of the model"),
        )
        return
    result = fold(before, weights)
    assert result.modified
    assert canonical(result.model) == canonical(parse(f"{head} {{ {expected} }}", {"w": weights["w"]}))
    gate = "column" if "column" in body else "g"
    assert set(result.folded) == {("w", gate)}
    assert result.refused == ()
    assert set(result.model.graph.initializers) == {"w"}
    assert np.abs(tensor(result.model, "w") - weights["w"] * factors).max() <= 2e-7 * np.abs(weights["w"]).max()


HEADS = "(float[N,S,8] x) => (float[N,S,4] y)"


@pytest.mark.parametrize(
    ("body", "gate", "factors"),
    [
        # heads of width 4: one scale per head, per channel of a head
        (
            "t = Transpose <perm = [0, 2, 1, 3]> (h) m = Mul(t, g) u = Transpose <perm = [0, 2, 1, 3]> (m) "
            "v = Reshape(u, merged) y = MatMul(v, w)",
            np.array([[[0.5]], [[2]]]),
            np.repeat([0.5, 2], 4)[:, None],
        ),
        (
            "m = Mul(h, g) v = Reshape(m, merged) y = MatMul(v, w)",
            np.array([1.0, 2, 3, 4]),
            np.tile([1, 2, 3, 4], 2)[:, None],
        ),
        ("m = Mul(h, g) v = Reshape(m, merged) y = MatMul(v, w)", np.array(0.5), np.array([[0.5]])),
        ("v = Reshape(h, merged) m = Mul(v, g) y = MatMul(m, w)", np.arange(8.0), np.arange(8.0)[:, None]),
    ],
)
def test_scales_of_heads_find_the_rows_of_the_projection(body: str, gate: Array, factors: Array) -> None:
    weights = {
        "w": RNG.standard_normal((8, 4)).astype(np.float32),
        "g": gate.astype(np.float32),
        "split": np.array([0, 0, 2, 4]),
        "merged": np.array([0, 0, 8]),
    }
    before = f"{HEADS} {{ r = Relu(x) h = Reshape(r, split) {body} }}"
    result = fold(before, weights)
    assert result.folded == (("w", "g"),)
    assert "Mul" not in [node.op_type for node in result.model.graph]
    assert np.abs(tensor(result.model, "w") - weights["w"] * factors).max() <= 1e-6


def test_scales_of_heads_find_the_columns_that_made_them() -> None:
    weights = {
        "w": RNG.standard_normal((8, 8)).astype(np.float32),
        "g": np.array([[[0.5]], [[2.0]]], dtype=np.float32),
        "split": np.array([0, 0, 2, 4]),
    }
    before = (
        "(float[N,S,8] x) => (float[N,2,S,4] y) { a = MatMul(x, w) h = Reshape(a, split) "
        "t = Transpose <perm = [0, 2, 1, 3]> (h) m = Mul(t, g) y = Tanh(m) }"
    )
    result = fold(before, weights)
    assert result.folded == (("w", "g"),)
    assert np.abs(tensor(result.model, "w") - weights["w"] * np.repeat([0.5, 2], 4)).max() <= 1e-6


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_take_scales_of_channels_before_and_after(groups: int) -> None:
    weights = {
        "g": GATE[:, None, None],
        "w": RNG.standard_normal((8, 4 // groups, 3, 3)).astype(np.float32),
        "k": RNG.standard_normal((8, 8, 1, 1)).astype(np.float32),
        "b": (8,),
        "f": RNG.uniform(0.5, 1.5, (8, 1, 1)).astype(np.float32),
    }
    text = (
        "(float[N,4,6,6] x) => (float[N,8,6,6] y) { m = Mul(x, g) "
        f"c = Conv <group = {groups}, pads = [1, 1, 1, 1]> (m, w) "
        "r = Relu(c) d = Conv(r, k, b) y = Mul(d, f) }"
    )
    result = fold(text, weights)
    assert sorted(result.folded) == [("b", "f"), ("k", "f"), ("w", "g")]
    assert [node.op_type for node in result.model.graph] == ["Conv", "Relu", "Conv"]
    rows = GATE.reshape(groups, 1, -1).repeat(8 // groups, axis=0).reshape(8, -1, 1, 1)
    assert np.abs(tensor(result.model, "w") - weights["w"] * rows).max() <= 1e-6


def test_the_bias_of_a_scaled_result_is_scaled_too() -> None:
    before = "(float[N,4] x) => (float[N,4] y) { a = Gemm(x, w, b) m = Mul(a, g) y = Relu(m) }"
    result = fold(before, {"w": (4, 4), "b": (4,), "g": GATE})
    assert result.folded == (("w", "g"), ("b", "g"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("m = Mul(r, g) p = MatMul(m, w) q = MatMul(m, v) y = Add(p, q)", "after it, 2 nodes read it; before it, Relu"),
        (
            "m = Mul(r, g) p = MatMul(m, w) q = MatMul(x, w) y = Add(p, q)",
            "after it, w has other uses; before it, Relu",
        ),
        ("m = Mul(r, g) y = Tanh(m)", "after it, Tanh reads it; before it, Relu makes it"),
        ("m = Mul(r, g) t = Transpose(w) y = MatMul(m, t)", "after it, t is not constant; before it, Relu makes it"),
        ("m = Mul(r, rows) y = MatMul(m, w)", "after it, the weight has no such axis; before it, Relu makes it"),
        ("a = MatMul(x, w) m = Mul(a, g) s = Add(a, m) y = Relu(s)", "before it, something else reads it"),
        ("a = Gemm(x, w, one) m = Mul(a, g) y = Relu(m)", "before it, the bias has no such axis"),
        ("m = Mul(r, g) y = Gemm(x, w, m)", "after it, Gemm adds it; before it, Relu makes it"),
    ],
)
def test_a_scale_that_cannot_be_folded_stays_and_says_why(body: str, reason: str) -> None:
    arrays: dict[str, Array] = {
        "w": RNG.standard_normal((4, 4)),
        "v": RNG.standard_normal((4, 4)),
        "g": GATE,
        "rows": GATE[:, None],
        "one": np.array([0.5]),
    }
    before = f"(float[4,4] x) => (float[4,4] y) {{ r = Relu(x) {body} }}"
    result = fold(
        before,
        {
            name: array
            for name, array in arrays.items()
            if any(f"{before}{name}{after}" in body for before in " (" for after in ",)")
        },
    )
    assert not result.modified
    assert reason in dict(result.refused)["m"]


def test_an_axis_that_mixes_rows_and_channels_is_no_place_for_scales() -> None:
    before = "(float[N,4] x) => (float[K,4] y) { r = Relu(x) m = Mul(r, g) f = Reshape(m, flat) y = MatMul(f, w) }"
    result = fold(before, {"g": GATE, "flat": np.array([-1, 2]), "w": (2, 4)})
    assert result.refused == (("m", "after it, Reshape reads it; before it, Relu makes it"),)


def test_a_constant_that_the_caller_may_replace_is_no_gate_and_no_weight() -> None:
    for replaced in ("g", "w"):
        text = "(float[N,4] x, float[4] g) => (float[N,4] y) { m = Mul(x, g) y = MatMul(m, w) }"
        text = text if replaced == "g" else text.replace("float[4] g", "float[4,4] w")
        model = parse(text, {"g": GATE, "w": np.eye(4)})
        assert not FoldGates()(model).modified


def test_a_gate_that_several_products_share_is_folded_into_each() -> None:
    before = (
        "(float[N,4] x) => (float[N,4] y) { m = Mul(x, g) a = MatMul(m, w) r = Relu(a) n = Mul(r, g) y = MatMul(n, v) }"
    )
    result = fold(before, {"g": GATE, "w": (4, 4), "v": (4, 4)})
    assert sorted(result.folded) == [("v", "g"), ("w", "g")]
    assert set(result.model.graph.initializers) == {"w", "v"}


def test_half_precision_stays_half_precision() -> None:
    head = "(float16[N,4] x) => (float16[N,4] y) { m = Mul(x, g) y = MatMul(m, w) }"
    w = RNG.standard_normal((4, 4)).astype(np.float16)
    model = parse(head, {"g": GATE.astype(np.float16), "w": w})
    assert FoldGates()(model).modified
    folded = tensor(model, "w")
    assert folded.dtype == np.float16
    assert np.array_equal(folded, w * GATE.astype(np.float16)[:, None])


def test_operators_before_opset_13_are_left_alone() -> None:
    text = "(float[N,4] x) => (float[N,4] y) { m = Mul(x, g) y = MatMul(m, w) }"
    model = parse(text, {"g": GATE, "w": (4, 4)}, opset=12)
    before = ir.to_proto(model)
    with pytest.raises(OpsetError, match="opset 12"):
        FoldGates()(model)
    assert ir.to_proto(model) == before


@pytest.mark.parametrize(("opset", "kv_heads"), [pytest.param(20, 4, marks=pytest.mark.slow), (23, 2)])
def test_the_gates_of_a_decoder_fold_into_its_output_projections(opset: int, kv_heads: int) -> None:
    model = random_decoder(kv_heads, 2)
    model.select(random_selection(model, 2))
    frozen = freeze(dynamic_graph(model, opset), 0).model
    expected = frozen.clone()
    result = FoldGates()(frozen)
    assert isinstance(result, Folding)
    gated = ("attention.output.weight", "ffn.down.weight")
    assert {weight for weight, _ in result.folded} == {f"layers.{n}.{name}" for n in (0, 1) for name in gated}
    gates = {gate for _, gate in result.folded}
    assert len(gates) == 4
    assert gates.isdisjoint(frozen.graph.initializers)
    assert set(frozen.graph.initializers) == set(expected.graph.initializers) - gates
    onnx.checker.check_model(ir.to_proto(frozen), full_check=True)
    ids = np.random.default_rng(1).integers(0, 512, (2, 7))
    before, after = (run(each, {"input_ids": ids})["logits"] for each in (expected, frozen))
    assert np.abs(after - before).max() <= 2e-6 * np.abs(before).max()
    assert not FoldGates()(frozen).modified
