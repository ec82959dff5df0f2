import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.passes.fold_constants import FoldConstants
from tests.unit.passes.graph_text import assert_same_values, check, parse

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


@pytest.mark.parametrize(
    ("text", "opset"),
    [
        ("list = SplitToSequence <axis = 1> (x, size)", 20),  # of unknown size: how many parts is not known
        ("list = SplitToSequence <axis = 1, keepdims = 0> (x, sizes)", 20),  # with sizes, axes stay
        ("list = SplitToSequence <axis = 1> (x, half)", 17),  # Split has no num_outputs yet
        ("list = SplitToSequence <axis = 1> (x, sizes)", 12),  # nor sizes
    ],
)
def test_lists_that_a_split_would_not_make_stay(text: str, opset: int) -> None:
    arrays = {"half": np.array(4), "sizes": np.array([3, 5]), "zero": np.array(0)}
    more = ", int64 size" if "size)" in text else ""
    weights = {name: array for name, array in arrays.items() if name == "zero" or f"{name})" in text}
    before = parse(
        f"(float[N,8] x{more}) => (float[N,K] y) {{ {text} y = SequenceAt(list, zero) }}",
        weights,
        opset=opset,
        infer=False,
    )
    after = before.clone()
    FoldConstants()(after)
    assert [node.op_type for node in after.graph] == ["SplitToSequence", "SequenceAt"]
    feeds = {"x": RNG.normal(size=(3, 8)).astype(np.float32)} | ({"size": np.array(2)} if more else {})
    assert_same_values(before, after, feeds, tolerance=0)


@pytest.mark.parametrize(("opset", "operator"), [(12, "ConcatFromSequence"), (13, "Concat"), (20, "Concat")])
def test_a_list_that_is_stacked(opset: int, operator: str) -> None:
    text = """(float[N,4] x) => (float[N,2,4] y) {
        e = Exp(x) list = SequenceConstruct(x, e) y = ConcatFromSequence <axis = 1, new_axis = 1> (list) }"""
    before = parse(text, opset=opset, infer=False)
    after = before.clone()
    FoldConstants()(after)
    assert after.graph.outputs[0].producer().op_type == operator
    check(after)
    assert_same_values(before, after, tolerance=0)


@pytest.mark.parametrize(
    "node",
    [
        "r = Bernoulli <seed = 1.0> (half)",
        "r = RandomNormalLike <seed = 1.0> (half)",
        "r = Dropout <seed = 1> (half, ratio, yes)",
    ],
)
def test_what_is_random_is_drawn_in_every_run(graphs, node: str) -> None:
    constants = {"half": "half = Constant<value = float[3] {0.5, 0.5, 0.5}>()"}
    constants["ratio"] = "ratio = Constant<value_float = 0.5>() yes = Constant<value = bool {1}>()"
    text = f"(float[3] x) => (float[3] y) {{ {' '.join(constants.values())} {node} y = Add(x, r) }}"
    model = graphs.build(text)
    FoldConstants()(model)
    assert graphs.operators(model) == [node.split()[2], "Add"]


def test_dropout_that_is_not_training_goes(graphs) -> None:
    model = graphs.build("(float[3] x) => (float[3] y) { r = Dropout(x) y = Neg(r) }")
    FoldConstants()(model)
    assert graphs.operators(model)[-1] == "Neg"
    assert "Dropout" not in graphs.operators(model)


@pytest.mark.parametrize(
    ("text", "default", "given"),
    [
        ("float[2,3] x, int64[2] v) => (float[A,B] y) { h = Expand(x, v) y = Relu(h) }", [2, 3], [1, 3]),
        ("float[2,3] x, int64[2] v) => (float[A,B] y) { h = Reshape(x, v) y = Relu(h) }", [2, 3], [3, 2]),
        ("float[2,3] x, bool v) => (float[2,3] y) { y = Dropout(x, half, v) }", True, False),
        (
            "float[2,3] x, bool v) => (float[2,3] y) { y = If (v) < "
            "then_branch = a () => (float[2,3] p) { p = Relu(x) }, "
            "else_branch = b () => (float[2,3] q) { q = Neg(x) }> }",
            True,
            False,
        ),
        ("float[2,3] x, float v) => (float[2,3] y) { w = Neg(v) y = Mul(x, w) }", np.float32(0), np.float32(2)),
    ],
)
def test_nothing_is_computed_from_a_default(text: str, default: object, given: object) -> None:
    weights = {"v": np.asarray(default)} | ({"half": np.array(0.0)} if "half" in text else {})
    before = parse(f"({text}", weights, infer=False)
    after = before.clone()
    FoldConstants()(after)
    assert "v" in after.graph.initializers
    for value in (given, default):
        feeds = {"x": RNG.normal(size=(2, 3)).astype(np.float32), "v": np.asarray(value)}
        assert_same_values(before, after, feeds, tolerance=0)


def test_a_parameter_of_a_body_stays() -> None:
    text = """(float[N,2] x, bool c) => (float[N,2] y) {
        y = If (c) <
            then_branch = one () => (float[N,2] a) <float[2] w = {2, 3}> { v = Neg(w) a = Mul(x, v) },
            else_branch = two () => (float[N,2] b) { b = Relu(x) }
        >
    }"""
    model = parse(text, infer=False)
    FoldConstants()(model)
    assert [node.op_type for node in model.graph.all_nodes()] == ["If", "Neg", "Mul", "Relu"]


HUGE, TINY = np.array([2**31 - 1, 5, -7], np.int32), np.array([3, -2, 1], np.int32)
ALL = {"all": np.array([0])}


@pytest.mark.parametrize(
    ("node", "arrays"),
    [
        ("Add(a, b)", {"a": np.array([32767, -32768], np.int16), "b": np.array([1, -1], np.int16)}),
        ("Mul(a, b)", {"a": HUGE, "b": TINY}),
        ("Div(a, b)", {"a": np.array([7, -7, -8]), "b": np.array([-2, 2, 3])}),
        ("ReduceProd <keepdims = 0> (a, all)", {"a": np.array([2, 3, 5]), **ALL}),
        ("ReduceSum <keepdims = 0> (a, all)", {"a": TINY, **ALL}),
        ("Range(a, b, c)", {"a": np.array(5), "b": np.array(-5), "c": np.array(-3)}),
        ("Cast <to = 6> (a)", {"a": np.array(-1.7, np.float32)}),
        ("Gather(a, b)", {"a": HUGE, "b": np.array([-1, -3])}),
        ("Slice(a, b, c, all, d)", {"a": HUGE, "b": np.array([-1]), "c": np.array([-9]), "d": np.array([-2]), **ALL}),
    ],
)
def test_results_are_those_of_the_engine_also_where_they_overflow(node: str, arrays: dict[str, np.ndarray]) -> None:
    before = parse(f"() => (float y) {{ r = {node} c1 = Cast <to = 11> (r) y = Neg(c1) }}", arrays)
    before.graph.outputs[0].type, before.graph.outputs[0].shape = ir.TensorType(ir.DataType.DOUBLE), None
    after = before.clone()
    FoldConstants()(after)
    assert len(after.graph) == 0
    assert_same_values(before, after, {}, tolerance=0)


@pytest.mark.parametrize(
    ("node", "arrays"),
    [
        ("ReduceSum(a, all)", {"a": HUGE, **ALL}),
        ("ReduceMean(a, all)", {"a": HUGE, **ALL}),
        ("ReduceProd(a, all)", {"a": HUGE, **ALL}),
        ("ReduceL1(a, all)", {"a": HUGE, **ALL}),
        ("ReduceSumSquare(a, all)", {"a": TINY, **ALL}),
        ("ReduceL2(a, all)", {"a": TINY, **ALL}),
        ("Pow(a, b)", {"a": HUGE, "b": np.array([2, 2, 2], np.int32)}),
        ("Div(a, b)", {"a": HUGE, "b": np.array([0, 1, 1], np.int32)}),
        ("Cast <to = 6> (a)", {"a": np.array(1e10, np.float32)}),
        ("Cast <to = 7> (a)", {"a": np.array(np.nan, np.float32)}),
        ("Range(a, b, c)", {name: np.array(n, np.float32) for name, n in (("a", 0.0), ("b", 1.0), ("c", 0.1))}),
        ("OneHot(a, b, c)", {"a": np.array([-1, 2]), "b": np.array(3), "c": np.array([0, 1])}),
        ("GatherElements(a, b)", {"a": HUGE, "b": np.array([-1])}),
        ("Sign(a)", {"a": np.array(np.nan, np.float16)}),
        # A start before the beginning: clamped by the standard, empty in numpy.
        ("Slice(a, b, c, all, d)", {"a": HUGE, "b": np.array([-4]), "c": np.array([-9]), "d": np.array([-1]), **ALL}),
    ],
)
def test_what_engines_may_compute_otherwise_stays(node: str, arrays: dict[str, np.ndarray]) -> None:
    model = parse(f"() => (float y) {{ r = {node} y = Identity(r) }}", arrays, infer=False)
    model.graph.outputs[0].type = model.graph.outputs[0].shape = None
    FoldConstants()(model)
    assert node.split("(")[0].split()[0] in [each.op_type for each in model.graph]


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("s = Shape <start = 0, end = 1> (x) d = Add(s, less) y = Abs(d)", "int64[1] y"),
        ("s = Shape(x) r = Reshape(s, row) y = Gather <axis = 0> (r, first)", "int64[1,2] y"),
        ("s = Shape(x) r = Unsqueeze(s, first) y = Gather <axis = 0> (r, first)", "int64[1,2] y"),
    ],
)
def test_lengths_are_no_special_numbers(text: str, output: str) -> None:
    """The difference of two lengths may be negative, and lengths may be arranged as a matrix."""
    weights = {"less": np.array([-5]), "row": np.array([1, 2]), "first": np.array([0])}
    rows = 3 if "Gather" in text else "N"
    before = parse(
        f"(float[{rows},4] x) => ({output}) {{ {text} }}", {n: w for n, w in weights.items() if f"{n})" in text}
    )
    after = before.clone()
    FoldConstants()(after)
    check(after)
    assert_same_values(before, after, tolerance=0)


def test_a_branch_that_is_not_taken_reads_nothing_any_more(graphs):
    """Its nodes would still be users of the weight, whose channels go only if all users agree."""
    text = """(float[N,4] x) => (float[N,6] y) { z = Mul(w, gate) y = If(yes) <
        then_branch = t () => (float[N,6] p) { m = MatMul(x, z) p = Tanh(m) },
        else_branch = e () => (float[N,6] q) { v = Concat <axis = 1> (z, z) h = MatMul(x, v)
            q = Slice(h, zero, six, one) }> }"""
    arrays = {"zero": np.array([0]), "six": np.array([6]), "one": np.array([1]), "yes": np.array(True)}
    model = graphs.build(text, w=np.ones((4, 6)), gate=np.arange(6.0) % 2, **arrays)
    FoldConstants()(model)
    nodes = set(model.graph)
    assert "If" not in graphs.operators(model)
    assert all(use.node in nodes for value in model.graph.initializers.values() for use in value.uses())
    assert all(use.node in nodes for node in nodes for out in node.outputs for use in out.uses())
