import numpy as np
import pytest

from cpcompile.passes.fold_constants import FoldConstants

RNG = np.random.default_rng(0)


def test_a_row_of_a_gate_table_folds_through_its_repetition(graphs):
    before = graphs.build(
        """(float[N,6] x) => (float[N,6] y) {
            row = Gather(table, context) column = Unsqueeze(row, last) wide = Expand(column, size)
            flat = Reshape(wide, all) y = Mul(x, flat) }""",
        table=np.array([[1.0, 2.0], [0.0, 3.0]]),
        context=np.array(1),
        last=np.array([-1]),
        size=np.array([2, 3]),
        all=np.array([6]),
    )
    after = before.clone()
    assert FoldConstants()(after).modified
    assert graphs.operators(after) == ["Mul"]
    graphs.assert_same(before, after, {"x": np.ones((2, 6), np.float32)}, 0)
    assert not FoldConstants()(after).modified


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("t = Transpose(w) y = MatMul(x, t)", "w"),
        ("t = Reshape(flat, size) y = MatMul(x, t)", "flat"),
        ("t = Add(scale, one) y = Mul(x, t)", "scale"),
        ("t = Mul(scale, scale) y = Mul(x, t)", "scale"),
    ],
)
def test_a_parameter_stays_under_its_name(graphs, body, name):
    arrays = {
        "w": RNG.normal(size=(4, 4)),
        "flat": RNG.normal(size=(2, 8)),
        "scale": RNG.normal(size=4),
        "one": np.array(1.0),
        "size": np.array([4, 4]),
    }
    model = graphs.build(f"(float[N,4] x) => (float[N,4] y) {{ {body} }}", **arrays)
    operators = graphs.operators(model)
    FoldConstants()(model)
    assert graphs.operators(model) == operators
    np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), arrays[name].astype(np.float32))


def test_equal_parameters_stay_two(graphs):
    w = RNG.normal(size=(4, 4))
    model = graphs.build("(float[N,4] x) => (float[N,4] y) { h = MatMul(x, a) y = MatMul(h, b) }", a=w, b=w)
    FoldConstants()(model)
    assert set(graphs.shapes(model)) == {"a", "b"}


def test_lists_become_split(graphs):
    before = graphs.build(
        """(float[N,8] x) => (float[N,4] y) {
            list = SplitToSequence <axis = 1> (x, half) first = SequenceAt(list, zero) second = SequenceAt(list, one)
            y = Sub(first, second) }""",
        infer=False,  # the inferred type of a list does not survive in onnx_ir
        half=np.array(4),
        zero=np.array(0),
        one=np.array(1),
    )
    after = before.clone()
    FoldConstants()(after)
    assert "Split" in graphs.operators(after)
    assert "SequenceAt" not in graphs.operators(after)
    graphs.assert_same(before, after, {"x": RNG.normal(size=(3, 8)).astype(np.float32)}, 0)
