import numpy as np
import onnx
import onnx_ir as ir
import pytest

from cpcompile.passes.clean_up import CleanUp
from tests.unit.passes.graph_text import assert_same_values, canonical, check, inputs_of, parse, run

X = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Identity(x) y = Neg(a)", ["Neg"]),
        ("a = Neg(x) y = Identity(a)", ["Neg"]),
        ("a = Mul(x, ones) y = Neg(a)", ["Neg"]),
        ("a = Mul(one, x) y = Neg(a)", ["Neg"]),
        ("unused = Exp(x) y = Neg(x)", ["Neg"]),
        ("a = Neg(x) b = Identity(a) c = Identity(b) y = Neg(c)", ["Neg", "Neg"]),
        # an input of the model cannot itself be an output
        ("y = Identity(x)", ["Identity"]),
        ("a = Mul(x, twos) y = Neg(a)", ["Mul", "Neg"]),
    ],
)
def test_what_has_no_effect_goes(graphs, body, left):
    constants = {"ones": np.ones(4), "one": np.array(1.0), "twos": np.full(4, 2.0)}
    shaped = f"(float[2,4] x) => (float[2,4] y) <float[2,4] a> {{ {body} }}"
    before = graphs.build(
        shaped, **{name: array for name, array in constants.items() if f"{name})" in body or f"({name}" in body}
    )
    after = before.clone()
    result = CleanUp()(after)
    assert graphs.operators(after) == left
    assert result.modified == (graphs.operators(before) != left)
    assert [value.name for value in after.graph.outputs] == ["y"]
    graphs.assert_same(before, after, {"x": X}, 0)
    assert not CleanUp()(after).modified


def test_two_outputs_keep_their_names(graphs):
    before = graphs.build(
        "(float[2,4] x) => (float[2,4] y, float[2,4] z) { a = Neg(x) y = Identity(a) z = Identity(y) }"
    )
    after = before.clone()
    CleanUp()(after)
    graphs.assert_same(before, after, {"x": X}, 0)


@pytest.mark.parametrize("infer", [True, False])
def test_ones_that_stretch_an_unknown_shape_stay(graphs, infer):
    text = "(float x) => (float[U] y) { a = Neg(x) b = Mul(a, ones) y = Neg(b) }"
    model = graphs.build(text, infer=infer, ones=np.ones(3))
    assert not CleanUp()(model).modified
    assert graphs.run(model, {"x": np.array(2, np.float32)})["y"].shape == (3,)


def test_ones_that_the_caller_may_override_stay(graphs):
    model = graphs.build("(float[2,4] x, float[4] ones) => (float[2,4] y) { y = Mul(x, ones) }", ones=np.ones(4))
    assert not CleanUp()(model).modified


def test_a_protected_parameter_stays_even_if_it_is_all_ones(graphs):
    model = graphs.build("(float[2,4] x) => (float[2,4] y) { y = Mul(x, w) }", w=np.ones(4))
    assert not CleanUp(frozenset({"w"}))(model).modified


def test_unused_initializers_go_and_used_ones_keep_their_names(graphs):
    model = graphs.build(
        "(float[2,4] x) => (float[2,4] y) { y = Mul(x, used) }", used=np.full(4, 2.0), spare=np.ones(9)
    )
    assert CleanUp()(model).modified
    assert set(model.graph.initializers) == {"used"}


def test_expand_to_the_same_shape_goes(graphs):
    text = "(float[2,4] x) => (float[2,4] y) { a = Expand(x, size) y = Neg(a) }"
    model = graphs.build(text, size=np.array([1, 4]))
    assert CleanUp()(model).modified
    assert graphs.operators(model) == ["Neg"]


def test_subgraphs_are_cleaned_too() -> None:
    """What only a removed node in a subgraph read from outside goes with it; inputs and outputs of a subgraph stay."""
    head, tail = "(float[2,4] x, bool c) => (float[2,4] y) { h = Exp(x)", "y = Relu(z) }"
    before = f"""{head} e = Cos(h) z = If (c) <
            then_branch = one () => (float[2,4] a) <float[2,4] p, float[2,4] q, float[4] s = {{1, 1, 1, 1}}> {{
                p = Mul(h, s) q = Sin(e) a = Identity(p) }},
            else_branch = two () => (float[2,4] b) {{
                b = Loop (n, , h) <body = three (int64 i, bool go, float[2,4] t) => (bool on, float[2,4] u) {{
                    on = Identity(go) r = Identity(t) k = Neg(e) u = Neg(r) }}> }}
        > {tail}"""
    expected = f"""{head} z = If (c) <
            then_branch = one () => (float[2,4] a) {{ a = Identity(h) }},
            else_branch = two () => (float[2,4] b) {{
                b = Loop (n, , h) <body = three (int64 i, bool go, float[2,4] t) => (bool on, float[2,4] u) {{
                    on = Identity(go) u = Neg(t) }}> }}
        > {tail}"""
    weights = {"n": np.array(3)}
    original, model = parse(before, weights), parse(before, weights)
    assert CleanUp()(model).modified
    assert canonical(model) == canonical(parse(expected, weights))
    assert not [value for graph in model.graph.subgraphs() for value in graph.initializers]
    check(model)
    for condition in (True, False):
        assert_same_values(original, model, {**inputs_of(model), "c": np.array(condition)})
    assert not CleanUp()(model).modified


def test_functions_are_cleaned_too() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "own" : 1]> g (float[2,4] x) => (float[2,4] y) { y = own.F(x) }
        <domain: "own", opset_import: ["" : 20]> F (x) => (y) { a = Identity(x) unused = Exp(a) y = Neg(a) }"""
    before = onnx.parser.parse_model(text)
    model = ir.from_proto(before)
    assert CleanUp()(model).modified
    (function,) = model.functions.values()
    assert [node.op_type for node in function] == ["Neg"]
    assert np.array_equal(run(model, {"x": X})["y"], run(before, {"x": X})["y"])
    assert not CleanUp()(model).modified
