import numpy as np
import onnx_ir as ir

from cpcompile.passes.transpose_parameters import TransposeParameters
from tests.unit.passes.graph_text import parse

RNG = np.random.default_rng(0)
X = {"x": RNG.normal(size=(3, 4)).astype(np.float32)}


def test_a_transposed_parameter_is_stored_that_way_under_its_name(graphs):
    w = RNG.normal(size=(5, 4)).astype(np.float32)
    before = graphs.build(
        "(float[N,4] x) => (float[N,5] y) { t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }", w=w
    )
    after = before.clone()
    result = TransposeParameters()(after)
    assert result.modified
    assert result.permutations == {"w": (1, 0)}
    assert graphs.operators(after) == ["MatMul"]
    assert isinstance(after.graph.initializers["w"].const_value, ir.LazyTensor)
    np.testing.assert_array_equal(after.graph.initializers["w"].const_value.numpy(), w.T)
    graphs.check(after)
    graphs.assert_same(before, after, X, 0)
    again = TransposeParameters()(after)
    assert not again.modified
    assert again.permutations == {}


def test_three_axes_are_permuted_in_order(graphs):
    w = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    before = graphs.build(
        "(float[N,4] x) => (float[3,N,2] y) { t = Transpose <perm = [2, 1, 0]> (w) y = MatMul(x, t) }", w=w
    )
    after = before.clone()
    assert TransposeParameters()(after).permutations == {"w": (2, 1, 0)}
    graphs.assert_same(before, after, X, 0)


def test_a_tied_embedding_stays_as_it_is(graphs):
    model = graphs.build(
        """(int64[N] ids) => (float[N,6] y) { e = Gather(w, ids) t = Transpose(w) y = MatMul(e, t) }""",
        w=RNG.normal(size=(6, 4)),
    )
    assert not TransposeParameters()(model).modified
    assert graphs.shapes(model) == {"w": (6, 4)}


def test_the_layout_of_an_input_with_a_default_is_the_interface(graphs):
    model = graphs.build(
        "(float[N,4] x, float[5,4] w) => (float[N,5] y) { t = Transpose(w) y = MatMul(x, t) }",
        w=RNG.normal(size=(5, 4)),
    )
    assert not TransposeParameters()(model).modified


def test_an_operator_of_another_domain_is_not_understood():
    model = parse("(float[N,4] x) => (float[N,5] y) { t = other.Transpose(w) y = MatMul(x, t) }", {"w": (5, 4)})
    assert not TransposeParameters()(model).modified
