"""Every entry of the table: rewritten with the same values, or refused with node, module, reason and way out."""

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.core.errors import CpcompileError
from cpcompile.files.onnx_file import MODULE
from cpcompile.passes.legalize_for_tensorrt import RULES, LegalizeForTensorRT
from tests.unit.passes.graph_text import assert_same_values, canonical, check, parse, run

QKV = "float[N,2,S,8] q, float[N,2,S,8] k, float[N,2,S,8] v"
Y = "float[N,2,S,8] y"
PAST, PRESENT = "float[N,2,P,8] pk, float[N,2,P,8] pv", "float[N,2,T,8] nk, float[N,2,T,8] nv"


def legalize(model: ir.Model) -> ir.Model:
    assert LegalizeForTensorRT()(model).modified
    check(model)
    assert not LegalizeForTensorRT()(model).modified
    return model


def refusal(model: ir.Model) -> str:
    with pytest.raises(CpcompileError) as raised:
        LegalizeForTensorRT()(model)
    return str(raised.value)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        pytest.param(
            f"({QKV}, bool[S,T] m, {PAST}) => ({Y}, {PRESENT}) {{ y, nk, nv = Attention(q, k, v, m, pk, pv) }}",
            f"({QKV}, bool[S,T] m, {PAST}) => ({Y}, {PRESENT}) "
            "{ nk = Concat<axis=2>(pk, k) nv = Concat<axis=2>(pv, v) y = Attention(q, nk, nv, m) }",
            id="a cache that is given on",
        ),
        pytest.param(
            f"({QKV}, {PAST}) => ({Y}, {PRESENT}) {{ y, nk, nv = Attention(q, k, v, , pk, pv) }}",
            f"({QKV}, {PAST}) => ({Y}, {PRESENT}) "
            "{ nk = Concat<axis=2>(pk, k) nv = Concat<axis=2>(pv, v) y = Attention(q, nk, nv) }",
            id="a cache without a mask",
        ),
        pytest.param(
            f"({QKV}) => ({Y}, float[N,2,S,8] nk, float[N,2,S,8] nv) {{ y, nk, nv = Attention<is_causal=1>(q, k, v) }}",
            f"({QKV}) => ({Y}, float[N,2,S,8] nk, float[N,2,S,8] nv) "
            "{ nk = Identity(k) nv = Identity(v) y = Attention<is_causal=1>(q, nk, nv) }",
            id="the first step of a cache",
        ),
        pytest.param(
            f"({QKV}) => ({Y}) {{ y = Attention<softmax_precision=1>(q, k, v) }}",
            f"({QKV}) => ({Y}) {{ y = Attention(q, k, v) }}",
            id="a softmax in the precision that it has anyway",
        ),
    ],
)
def test_rewritten(before: str, expected: str) -> None:
    after = legalize(parse(before))
    assert canonical(after) == canonical(parse(expected))
    feeds = dict.fromkeys("qkv", (3, 2, 5, 8)) | dict.fromkeys(("pk", "pv"), (3, 2, 2, 8))
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in feeds.items()}
    arrays["m"] = rng.random((5, 7)) < 0.7
    arrays["m"][:, 0] = True
    names = [value.name for value in after.graph.inputs]
    assert_same_values(parse(before), after, {name: arrays[name] for name in names})


def test_tables_of_rotary_embeddings_are_repeated_for_the_batch() -> None:
    interface = "(float[N,2,S,8] x, float[1,S,4] c, float[1,S,4] s) => (float[N,2,S,8] y)"
    before = parse(f"{interface} {{ y = RotaryEmbedding(x, c, s) }}")
    before.graph[0].name = "rotary"
    after = legalize(before.clone())
    assert [node.op_type for node in after.graph] == ["Shape", "Concat", "Expand", "Expand", "RotaryEmbedding"]
    rng = np.random.default_rng(0)
    shapes = {"x": (3, 2, 5, 8), "c": (1, 5, 4), "s": (1, 5, 4)}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    repeated = {name: np.repeat(value, 3, axis=0) if name != "x" else value for name, value in feeds.items()}
    expected = run(parse(f"{interface.replace('[1,', '[N,')} {{ y = RotaryEmbedding(x, c, s) }}"), repeated)["y"]
    assert np.array_equal(run(after, feeds)["y"], expected)  # ONNX Runtime too refuses the original
    for single in (interface.replace("[N,", "[1,"), interface.replace("[1,", "[N,")):
        assert not LegalizeForTensorRT()(parse(f"{single} {{ y = RotaryEmbedding(x, c, s) }}")).modified


@pytest.mark.parametrize(
    ("text", "node", "reason", "way"),
    [
        (
            f"({QKV}, {PAST}) => ({Y}) {{ y = Attention<is_causal=1>(q, k, v, , pk, pv) }}",
            "Attention",
            "causal Attention with a cache",
            "--opset 20",
        ),
        (
            f"({QKV}) => ({Y}, float[N,2,S,S] s) {{ y, , , s = Attention(q, k, v) }}",
            "Attention",
            "its scores",
            "--opset 20",
        ),
        (f"({QKV}) => ({Y}) {{ y = Attention<softcap=30.0>(q, k, v) }}", "Attention", "softcap", "--opset 20"),
        (
            f"({QKV}) => ({Y}) {{ y = Attention<softmax_precision=16>(q, k, v) }}",
            "Attention",
            "precision of",
            "--opset 20",
        ),
        (
            f"({QKV}, bool[S,S] m) => ({Y}) {{ y = Attention<is_causal=1>(q, k, v, m) }}",
            "Attention",
            "not both",
            "--opset 20",
        ),
        (
            "(float[N,S,W] q, float[N,S,W] k, float[N,S,W] v) => (float[N,S,W] y, float[N,2,S,8] a, float[N,2,S,8] b)"
            " { y, a, b = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v) }",
            "Attention",
            "not an axis of their own",
            "--opset 20",
        ),
        ("(float[N] x) => (int64[1,M] y) { y = NonZero(x) }", "NonZero", "depends on values", "by Where"),
        (
            "(float[N] x, bool[N] c) => (float[M] y) { y = Compress<axis=0>(x, c) }",
            "Compress",
            "depends on values",
            "by Where",
        ),
        ("(float[N] x) => (float[M] y) { y = Unique(x) }", "Unique", "depends on values", "replace it"),
        ("(float[N,3,3] x) => (float[N] y) { y = Det(x) }", "Det", "no such operator", "replace it"),
        (
            "(float[N] x) => (uint8[N] y) { y, s, z = DynamicQuantizeLinear(x) }",
            "DynamicQuantizeLinear",
            "no such",
            "fixed scales",
        ),
        (
            "(float[N] x, float s, uint8 z) => (uint8[N] y) { y = QuantizeLinear(x, s, z) }",
            "QuantizeLinear",
            "zero point",
            "symmetrically",
        ),
        (
            "(uint8[N] x, float s, uint8 z) => (float[N] y) { y = DequantizeLinear(x, s, z) }",
            "DequantizeLinear",
            "zero point",
            "symmetrically",
        ),
        (
            "(bool c, bool d, float[N] x) => (float[N] y) { y = If(c)<"
            "then_branch = a () => (float[N] t) { t = If(d)<"
            "then_branch = e () => (float[N] g) { g = Abs(x) }, else_branch = f () => (float[N] h) { h = Exp(x) }> },"
            "else_branch = b () => (float[N] u) { u = Neg(x) }> }",
            "If",
            "If within If",
            "one If",
        ),
        (
            "(float[N] x) => (float[N] y) { a = Cast<to=11>(x) b = Exp(a) y = Cast<to=1>(b) }",
            "Cast",
            "float64",
            "in float32",
        ),
        ("(int64[N] x) => (float[N] y) { a = Cast<to=5>(x) y = Cast<to=1>(a) }", "Cast", "no int16", "int32"),
    ],
)
def test_refused(text: str, node: str, reason: str, way: str) -> None:
    model = parse(text)
    for each in model.graph:
        each.metadata_props[MODULE] = "layers.1.attention"
    message = refusal(model)
    named = next(each for each in model.graph if each.op_type == node)
    assert f"{node} {named.name}".strip() in message
    assert "(module layers.1.attention)" in message
    assert reason in message and way in message


def test_an_operator_of_another_domain_is_refused_by_name() -> None:
    weights = {"w": np.zeros((8, 1, 16), np.uint8), "s": np.ones(8)}
    text = "(float[N,32] x) => (float[N,8] y) { y = other.MatMulNBits<K=32, N=8, bits=4, block_size=32>(x, w, s) }"
    assert "int4 blocks" in refusal(parse(text, weights, infer=False))


def test_an_input_of_a_refused_type_is_named() -> None:
    message = refusal(parse("(double[N] x, string[N] z) => (double[N] y) { y = Exp(x) }"))
    assert "the input x: float64" in message
    assert "the input z: TensorRT has no string" in message


def test_many_refusals_are_counted() -> None:
    message = refusal(
        parse(f"(float[N] x) => (int64[1,M] y4) {{ {' '.join(f'y{i} = NonZero(x)' for i in range(5))} }}")
    )
    assert message.count("NonZero") == 3 and message.endswith("(and 2 more)")


def test_what_is_legal_stays() -> None:
    model = parse(f"({QKV}) => ({Y}) {{ a = Attention(q, k, v) y = Softmax(a) }}")
    assert not LegalizeForTensorRT()(model).modified


def test_every_rule_is_tried_here() -> None:
    tried = {
        "Attention",
        "RotaryEmbedding",
        "QuantizeLinear",
        "DequantizeLinear",
        "If",
        "NonZero",
        "Compress",
        "Unique",
        "Det",
    }
    assert set(RULES) == tried | {"DynamicQuantizeLinear", "MatMulNBits"}
