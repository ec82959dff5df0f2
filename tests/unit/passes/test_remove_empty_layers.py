"""What adds nothing goes, with everything that only it needed; what has a shape to give stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from cpcompile.core.selection import Selection, UnitKind
from cpcompile.passes.bind_context import BindContext
from cpcompile.passes.canonicalize_shapes import CanonicalizeShapes
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.fold_constants import FoldConstants
from cpcompile.passes.freeze import freeze
from cpcompile.passes.opset import OpsetError
from cpcompile.passes.remove_empty_layers import EmptyLayers, RemoveEmptyLayers
from tests.unit.passes.decoders import CONTEXTS, dynamic_graph, random_decoder
from tests.unit.passes.graph_text import Weights, assert_same_values, canonical, parse, run, tensor

DEAD = {"w": (4, 4), "gate": np.zeros(4), "v": (4, 4)}
"""A branch `m = MatMul(x, w) g = Mul(m, gate) d = MatMul(g, v)` that is zero."""
BRANCH = "m = MatMul(x, w) g = Mul(m, gate) d = MatMul(g, v)"


def remove(before: str, weights: Weights, *, opset: int = 23) -> EmptyLayers:
    """What the pass makes of `before`, checked: same values, valid, and nothing left for a second run."""
    original = parse(before, weights, opset=opset)
    result = RemoveEmptyLayers()(parse(before, weights, opset=opset))
    assert isinstance(result, EmptyLayers)
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert_same_values(original, result.model)
    again = RemoveEmptyLayers()(result.model)
    assert isinstance(again, EmptyLayers)
    assert (again.modified, again.sums, again.zeros) == (False, (), ())
    return result


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("s = Add(x, d) y = Relu(s)", "y = Relu(x)"),
        ("s = Add(d, x) y = Relu(s)", "y = Relu(x)"),
        ("s = Sub(x, d) y = Relu(s)", "y = Relu(x)"),
        ("s = Sub(d, x) y = Relu(s)", "s = Neg(x) y = Relu(s)"),
        ("e = Exp(x) s = Sum(x, d, e) y = Relu(s)", "e = Exp(x) s = Sum(x, e) y = Relu(s)"),
        ("s = Sum(d, x, d) y = Relu(s)", "y = Relu(x)"),
        # the input of the model cannot itself be its output, a result can
        ("y = Add(x, d)", "y = Identity(x)"),
        ("e = Exp(x) y = Add(e, d)", "y = Exp(x)"),
        # layer upon layer: the second is zero because the first is
        ("s = Add(d, g) t = Tanh(s) u = Add(x, t) y = Relu(u)", "y = Relu(x)"),
    ],
)
def test_a_zero_term_goes_with_all_that_led_to_it(body: str, expected: str) -> None:
    head = "(float[N,4] x) => (float[N,4] y) {"
    result = remove(f"{head} {BRANCH} {body} }}", DEAD)
    assert result.modified
    assert canonical(result.model) == canonical(parse(f"{head} {expected} }}"))
    assert not result.model.graph.initializers


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("h = Add(d, b) s = Add(x, h) y = Relu(s)", "s = Add(x, b) y = Relu(s)"),
        ("h = Sub(d, b) s = Add(x, h) y = Relu(s)", "h = Neg(b) s = Add(x, h) y = Relu(s)"),
        ("h = Sum(b, d, c) s = Add(x, h) y = Relu(s)", "h = Sum(b, c) s = Add(x, h) y = Relu(s)"),
        # what is made of it stretches just as well, by one way or by two
        ("h = Add(d, b) k = Mul(h, c) s = Add(x, k) y = Relu(s)", "k = Mul(b, c) s = Add(x, k) y = Relu(s)"),
        (
            "h = Add(d, b) k = Tanh(h) l = Cos(h) m2 = Mul(k, l) y = Add(m2, x)",
            "k = Tanh(b) l = Cos(b) m2 = Mul(k, l) y = Add(m2, x)",
        ),
        ("h = Add(d, one) s = Add(x, h) y = Relu(s)", "s = Add(x, one) y = Relu(s)"),
        ("h = Gemm(g, v, b) y = Add(x, h)", "y = Add(x, b)"),
        ("h = Gemm <transB = 1> (g, v, x) y = Relu(h)", "y = Relu(x)"),
    ],
)
def test_a_sum_may_get_narrower_where_its_readers_stretch_it(body: str, expected: str) -> None:
    weights = {"b": (4,), "c": (4,), "one": np.array(1.5)}
    used = {name: weight for name, weight in weights.items() if f" {name})" in body or f"({name}" in body}
    head = "(float[N,4] x) => (float[N,4] y) {"
    result = remove(f"{head} {BRANCH} {body} }}", DEAD | used)
    assert canonical(result.model) == canonical(parse(f"{head} {expected} }}", used))
    assert set(result.model.graph.initializers) == set(used)


@pytest.mark.parametrize(
    "body",
    [
        "h = Add(d, b) y = Relu(h)",  # the output of the model
        "h = Add(d, b) y = MatMul(h, v)",
        "h = Add(d, b) k = PRelu(h, x) y = Relu(k)",  # stretches the slope only
        "h = Add(d, b) k = Softmax(h) y = Add(k, x)",
        "h = Add(d, b) k = Add(h, x) l = Neg(h) y = Concat <axis = 0> (k, l)",  # one reader of two
        "h = Gemm <beta = 0.5> (g, v, b) y = Add(x, h)",
        "h = Gemm(g, v) y = Concat <axis = 0> (x, h)",
    ],
)
def test_a_sum_that_something_needs_whole_stays(body: str) -> None:
    weights = DEAD | ({"b": (4,)} if "b)" in body else {})
    result = remove(f"(float[N,4] x) => (float[K,4] y) {{ {BRANCH} {body} }}", weights)
    assert result.sums == ()
    assert "gate" in result.model.graph.initializers


def test_the_result_says_which_sums_and_which_constants() -> None:
    weights = {"w": (4, 4), "zero": np.zeros((4, 4)), "o": (4, 4)}
    model = parse(
        "(float[N,4] x) => (float[N,8] y) { m = MatMul(x, zero) s = Add(x, m) "
        "t = Mul(o, zero) c = Concat <axis = 1> (w, t) y = MatMul(s, c) }",
        weights,
    )
    result = RemoveEmptyLayers()(model)
    assert isinstance(result, EmptyLayers)
    assert (result.sums, result.zeros) == (("s",), ("t",))
    assert set(model.graph.initializers) == {"w", "t.zero"}


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        # the zero gives the sum its shape
        ("r = ReduceSum <keepdims = 1> (x, last) m = Mul(x, gate) s = Add(r, m) y = Relu(s)", {"last": np.array([1])}),
        (
            "m = Mul(x, gate) r = ReduceSum <keepdims = 1> (x, last) s = Sum(m, r, m) y = Relu(s)",
            {"last": np.array([1])},
        ),
        # nothing is zero
        ("m = Mul(x, one) s = Add(x, m) y = Relu(s)", {"one": np.array([0.0, 0, 0, 1e-30])}),
        # 0 / x and max(x, 0) are no sums
        ("m = Mul(x, gate) y = Max(x, m)", {}),
    ],
)
def test_what_is_needed_stays(body: str, weights: Weights) -> None:
    gate: Weights = {"gate": np.zeros(4)} if "gate" in body else {}
    assert not remove(f"(float[N,4] x) => (float[N,4] y) {{ {body} }}", {**gate, **weights}).modified


def test_a_zero_of_known_shape_that_is_joined_becomes_a_constant() -> None:
    text = f"(float[3,4] x) => (float[3,8] y) {{ {BRANCH} y = Concat <axis = 1> (x, d) }}"
    result = remove(text, DEAD)
    assert (result.sums, result.zeros) == ((), ("d",))
    assert [node.op_type for node in result.model.graph] == ["Concat"]
    assert set(result.model.graph.initializers) == {"d.zero"}
    assert np.array_equal(tensor(result.model, "d.zero"), np.zeros((3, 4), dtype=np.float32))


@pytest.mark.parametrize("rows", ["N", "70000"])
def test_a_zero_whose_shape_is_open_or_large_is_computed(rows: str) -> None:
    text = f"(float[{rows},4] x) => (float[{rows},8] y) {{ {BRANCH} y = Concat <axis = 1> (x, d) }}"
    assert not remove(text, DEAD).modified


def test_an_output_that_is_zero_is_made_of_the_zero_before_it() -> None:
    text = f"(float[3,4] x) => (float[3,4] d, float[3,8] y) {{ {BRANCH} y = Concat <axis = 1> (x, d) }}"
    result = remove(text, DEAD)
    assert [node.op_type for node in result.model.graph] == ["MatMul", "Concat"]
    assert result.zeros == ("g",)


def test_terms_in_a_branch_go_too() -> None:
    text = """(float[N,4] x, bool c) => (float[N,4] y) {
        y = If (c) <
            then_branch = one () => (float[N,4] a) { m = Mul(x, gate) s = Add(x, m) a = Relu(s) },
            else_branch = two () => (float[N,4] b) { e = Exp(x) n = Mul(e, gate) b = Add(e, n) }
        >
    }"""
    result = remove(text, {"gate": np.zeros(4)})
    assert set(result.sums) == {"s", "b"}
    used = [n for n in result.model.graph.all_nodes() if n.outputs[0].uses() or n.outputs[0].is_graph_output()]
    assert {node.op_type for node in used} == {"If", "Relu", "Exp"}


def test_zeros_of_one_name_in_two_branches_are_two_constants() -> None:
    text = """(float[2,4] x, bool c) => (float[K,4] y) {
        y = If (c) <
            then_branch = one () => (float[4,4] a) { z = Mul(x, gate) a = Concat <axis = 0> (x, z) },
            else_branch = two () => (float[4,4] b) { z = Mul(x, gate) b = Concat <axis = 0> (z, x) }
        >
    }"""
    result = remove(text, {"gate": np.zeros(4)})
    assert result.zeros == ("z", "z")
    assert set(result.model.graph.initializers) == {"z.zero", "z.zero.1"}


def test_multiplication_by_one_goes_unless_it_is_a_protected_parameter() -> None:
    text = "(float[3,4] x) => (float[3,4] y) { m = Mul(x, ones) y = Relu(m) }"
    model = parse(text, {"ones": np.ones(4)})
    assert not RemoveEmptyLayers(CleanUp(frozenset({"ones"})))(model).modified
    assert [node.op_type for node in remove(text, {"ones": np.ones(4)}).model.graph] == ["Relu"]


def test_operators_before_opset_13_are_left_alone() -> None:
    text = "(float[3,4] x) => (float[3,4] y) { m = Mul(x, gate) s = Add(x, m) y = Relu(s) }"
    model = parse(text, {"gate": np.zeros(4)}, opset=12)
    before = ir.to_proto(model)
    with pytest.raises(OpsetError, match="opset 12"):
        RemoveEmptyLayers()(model)
    assert ir.to_proto(model) == before


@pytest.mark.parametrize("opset", [pytest.param(20, marks=pytest.mark.slow), 23])
def test_an_empty_layer_of_a_decoder_is_gone_and_half_of_one_too(opset: int) -> None:
    """By itself, without cutting channels: context a has lost layer 0, context b its heads in layer 1."""
    model = random_decoder(2, 4)
    ffn = np.ones((len(CONTEXTS), 2, 16), dtype=np.bool_)
    heads = np.ones((len(CONTEXTS), 2, 2), dtype=np.bool_)
    ffn[0, 0] = heads[0, 0] = heads[1, 1] = False
    model.select(Selection(CONTEXTS, {UnitKind.FFN: ffn, UnitKind.HEAD: heads}))
    dynamic = dynamic_graph(model, opset)
    ids = np.random.default_rng(4).integers(0, 512, (2, 5))
    for context, gone, lost in ((0, "layers.0.", 2), (1, "layers.1.attention", 1), (2, "nothing", 0)):
        graph = dynamic.clone()
        for prepare in (BindContext(context), FoldConstants(), CleanUp(), CanonicalizeShapes()):
            prepare(graph)
        result = RemoveEmptyLayers()(graph)
        assert isinstance(result, EmptyLayers)
        assert len(result.sums) == lost
        onnx.checker.check_model(ir.to_proto(graph), full_check=True)
        left = {name for name in graph.graph.initializers if name.startswith("layers.") and "_gate" not in name}
        everything = {
            name for name, _ in model.named_parameters() if name.startswith("layers.") and "_gate" not in name
        }
        assert left == {name for name in everything if not name.startswith(gone)}
        assert left == {
            name for name in freeze(dynamic, context).model.graph.initializers if name.startswith("layers.")
        }
        expected = run(dynamic, {"input_ids": ids, "context": np.array(context)})["logits"]
        got = run(graph, {"input_ids": ids})["logits"]
        assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()
        assert not RemoveEmptyLayers()(graph).modified
