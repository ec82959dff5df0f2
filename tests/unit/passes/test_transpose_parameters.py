import numpy as np
import onnx_ir as ir
import pytest

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


@pytest.mark.parametrize("shape", ["N", "N,M"])
def test_a_tied_embedding_is_stored_as_its_head(graphs, shape):
    before = graphs.build(
        f"""(int64[{shape}] ids) => (float[{shape},6] y) {{ e = Gather(w, ids) t = Transpose(w) y = MatMul(e, t) }}""",
        w=RNG.normal(size=(6, 4)),
    )
    after = before.clone()
    assert TransposeParameters()(after).permutations == {"w": (1, 0)}
    assert not TransposeParameters()(after).modified
    assert graphs.shapes(after) == {"w": (4, 6)}
    ids = np.array([-1, 0, 5, 3, 3, -6])
    graphs.assert_same(before, after, {"ids": {"N": ids, "N,M": ids.reshape(2, 3)}[shape]}, 0)


@pytest.mark.parametrize(
    "nodes",
    [
        "e = Gather <axis = 1> (w, ids) t = Transpose(w) y = MatMul(e, t)",
        "e = Gather(w, ids) t = Transpose(w) u = Neg(w) v = MatMul(e, t) y = MatMul(v, u)",
        "e = Gather(w, ids) y = MatMul(e, w)",
    ],
)
def test_a_table_that_is_read_in_other_ways_stays_as_it_is(graphs, nodes):
    model = graphs.build(f"(int64[N] ids) => (float[N,M] y) {{ {nodes} }}", infer=False, w=RNG.normal(size=(4, 4)))
    assert not TransposeParameters()(model).modified


def test_the_layout_of_an_input_with_a_default_is_the_interface(graphs):
    model = graphs.build(
        "(float[N,4] x, float[5,4] w) => (float[N,5] y) { t = Transpose(w) y = MatMul(x, t) }",
        w=RNG.normal(size=(5, 4)),
    )
    assert not TransposeParameters()(model).modified


def test_an_operator_of_another_domain_is_not_understood():
    model = parse("(float[N,4] x) => (float[N,5] y) { t = other.Transpose(w) y = MatMul(x, t) }", {"w": (5, 4)})
    assert not TransposeParameters()(model).modified


def test_a_parameter_that_several_nodes_transpose_alike(graphs):
    """In a subgraph, too; and a Transpose of what is already transposed."""
    text = """(float[N,4] x, bool c) => (float[N,5] y) {
        a = Transpose(w) p = MatMul(x, a) b = Transpose <perm = [1, 0]> (w)
        y = If (c) < then_branch = one () => (float[N,5] q) { d = MatMul(x, b) q = Add(p, d) },
                     else_branch = two () => (float[N,5] r) { s = Transpose(v) t = Transpose(s) r = MatMul(x, t) }> }"""
    before = graphs.build(text, w=RNG.normal(size=(5, 4)), v=RNG.normal(size=(4, 5)))
    after = before.clone()
    assert TransposeParameters()(after).permutations == {"w": (1, 0), "v": (0, 1)}
    assert not TransposeParameters()(after).modified
    assert [node.op_type for node in after.graph.all_nodes()].count("Transpose") == 0
    assert graphs.shapes(after) == {"w": (4, 5), "v": (4, 5)}
    for chosen in (False, True):
        graphs.assert_same(before, after, {**X, "c": np.array(chosen)}, 0)


def test_a_parameter_that_is_transposed_in_two_ways_stays(graphs):
    text = """(float[N,4] x) => (float[N,4] y) {
        a = Transpose <perm = [0, 2, 1]> (w) b = Transpose <perm = [1, 0, 2]> (w)
        p = MatMul(x, a) q = MatMul(x, b) y = ReduceSum(p, zero) }"""
    model = graphs.build(text, infer=False, w=RNG.normal(size=(4, 4, 4)), zero=np.array([0]))
    assert not TransposeParameters()(model).modified
