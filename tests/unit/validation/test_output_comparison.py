import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from cpcompile.validation.output_comparison import compare_arrays, compare_files, given_or_random

HEAD = '<ir_version: 10, opset_import: ["" : 20]> g '
PLAIN = "(float[N,4] x) => (float[N,4] y) { a = MatMul(x, w) y = Tanh(a) }"
WEIGHT = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)


def write(path: Path, text: str, weight: np.ndarray = WEIGHT) -> Path:
    model = onnx.parser.parse_model(HEAD + text)
    if "w)" in text or "w," in text:
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, path)
    return path


def test_a_model_is_equal_to_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", PLAIN)
    comparison = compare_files(path, path)
    assert comparison
    assert comparison.runs == 3
    assert [(out.name, out.max_abs_error) for out in comparison.outputs] == [("y", 0.0)]
    assert 0 < (comparison.outputs[0].tolerance or 0) < 1e-4


def test_rounding_is_allowed_and_more_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", PLAIN)
    rounded = write(tmp_path / "b.onnx", PLAIN, np.nextafter(WEIGHT, np.float32(9)))
    assert compare_files(path, rounded)
    other = compare_files(path, write(tmp_path / "c.onnx", PLAIN, WEIGHT * np.float32(1.001)))
    assert other.verdict == "fail"
    assert "y: it differs by" in (other.reason or "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(float[N,4] x) => (float[N,4] z) { a = MatMul(x, w) z = Tanh(a) }", "outputs are z instead of y"),
        ("(float[N,4] x) => (float[N,4] y, float[N,4] a) { a = MatMul(x, w) y = Tanh(a) }", "outputs are y, a"),
        ("(float[N,4] x, float q) => (float[N,4] y) { a = MatMul(x, w) y = Tanh(a) }", "inputs are no longer x"),
        ("(float[N,4] x) => (float[1,N,4] y) { a = MatMul(x, w) b = Tanh(a) y = Unsqueeze(b, i) }", "float32"),
        ("(float[N,4] x) => (float[N,4] y) { a = MatMul(x, w) b = Tanh(a) z = Sub(b, b) y = Div(b, z) }", "finite"),
        ("(float[N,4] x) => (float[N,4] y) { y = other.Unknown(x) }", "cannot load the result"),
        ("(float[2,4] x) => (float[2,4] y) { a = MatMul(x, w) y = Tanh(a) }", "refuses what the original takes"),
    ],
)
def test_another_function_fails_and_says_why(tmp_path: Path, text: str, says: str) -> None:
    model = onnx.parser.parse_model((HEAD if "other." not in text else HEAD.replace("]>", ', "other" : 1]>')) + text)
    if "w)" in text:
        model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    if "i)" in text:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "i"))
    onnx.save(model, tmp_path / "b.onnx")
    comparison = compare_files(write(tmp_path / "a.onnx", PLAIN), tmp_path / "b.onnx")
    assert comparison.verdict == "fail"
    assert says in (comparison.reason or "")


def test_a_runtime_that_believes_a_wrong_shape_says_nothing_about_the_tolerance() -> None:
    """With optimisations, ONNX Runtime computes shapes from what a file claims about its values."""
    eight, two = np.ones(8, np.float32), np.ones(2, np.float32)
    for expected, noise in ((eight, two), ([eight, eight], [eight])):
        assert compare_arrays("y", expected, noise, expected).reason is None
        changed = 2 * expected if isinstance(expected, np.ndarray) else [eight, 2 * eight]
        assert compare_arrays("y", expected, noise, changed).reason is not None


def test_integers_have_to_be_equal(tmp_path: Path) -> None:
    first = write(tmp_path / "a.onnx", "(int64[N] x) => (int64[N] y) { y = Add(x, x) }")
    second = write(tmp_path / "b.onnx", "(int64[N] x) => (int64[N] y) { y = Mul(x, x) }")
    assert compare_files(first, first)
    assert "elements differ" in (compare_files(first, second).reason or "")


def test_a_bound_input_is_fed_to_the_original_only(tmp_path: Path) -> None:
    first = write(tmp_path / "a.onnx", "(float[N] x, int64 c) => (float[N] y) { f = Cast<to = 1>(c) y = Mul(x, f) }")
    second = write(tmp_path / "b.onnx", "(float[N] x) => (float[N] y) { y = Add(x, x) }")
    assert compare_files(first, second, bound={"c": 2})
    assert not compare_files(first, second, bound={"c": 3})


def test_what_cannot_run_is_inconclusive_unless_inputs_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", "(float[N] x) => (float[2,M] y) { y = Reshape(x, s) }")
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([11, -1]), "s"))
    onnx.save(model, path)
    comparison = compare_files(path, path)
    assert comparison.verdict == "inconclusive"
    assert "--input" in (comparison.reason or "")
    assert compare_files(path, path, inputs=[{"x": np.ones(22, np.float32)}])
    strings = write(tmp_path / "s.onnx", "(string[N] x) => (string[N] y) { y = Identity(x) }")
    assert compare_files(strings, strings).verdict == "inconclusive"
    assert compare_files(strings, strings, inputs=[{"x": np.array(["a", "b"])}])


def test_given_inputs_are_compared_too(tmp_path: Path) -> None:
    """Random inputs hardly ever exceed 100, where these two differ."""
    first = write(tmp_path / "a.onnx", "(float[N] x) => (float[N] y) { y = Identity(x) }")
    text = "(float[N] x) => (float[N] y) { h = Constant<value = float {100.0}>() y = Min(x, h) }"
    second = write(tmp_path / "b.onnx", text)
    assert compare_files(first, second)
    assert not compare_files(first, second, inputs=[{"x": np.array([101.0], np.float32)}])


TABLE = "(int64[N,S] ids) => (float[N,S,4] y) { y = Gather(w, ids) }"
ROWS = np.arange(400, dtype=np.float32).reshape(100, 4)


@pytest.mark.parametrize(
    "text", [TABLE, TABLE.replace("int64[N,S] ids", "int64[1,4] ids").replace("[N,S,4]", "[1,4,4]")]
)
def test_embeddings_that_differ_from_row_2_on_are_different(tmp_path: Path, text: str) -> None:
    other = ROWS.copy()
    other[2:] += 1
    first, second = (write(tmp_path / f"{name}.onnx", text, rows) for name, rows in (("a", ROWS), ("b", other)))
    assert compare_files(first, first).drawn[0].high == 99
    assert compare_files(first, second).verdict == "fail"


def test_images_of_bytes_have_all_values(tmp_path: Path) -> None:
    text = (
        "(uint8[N,8] x) => (float[N,8] y) { f = Cast<to = 1>(x) h = Constant<value = float {200.0}>() y = Min(f, h) }"
    )
    first, second = (
        write(tmp_path / "a.onnx", text.replace("Min(f, h)", "Identity(f)")),
        write(tmp_path / "b.onnx", text),
    )
    assert compare_files(first, first)
    assert compare_files(first, second).verdict == "fail"


def test_the_special_token_of_a_comparison_is_drawn(tmp_path: Path) -> None:
    """One of 100 rows: only the second model gives it another value."""
    text = """(int64[N] ids) => (float[N,4] y) { e = Gather(w, ids) p = Constant<value = int64 {77}>()
        m = Equal(ids, p) a = Constant<value_ints = [1]>() u = Unsqueeze(m, a) z = Sub(e, e) y = Where(u, SAME, e) }"""
    first, second = (
        write(tmp_path / f"{name}.onnx", text.replace("SAME", same), ROWS) for name, same in (("a", "e"), ("b", "z"))
    )
    assert compare_files(first, second).verdict == "fail"


def test_a_difference_that_no_drawn_number_can_show_is_inconclusive(tmp_path: Path) -> None:
    """The graph does not say which sizes it takes; given ones decide."""
    text = "(int64[1] x) => (float[M] y) { o = Constant<value_floats = [1.0]>() y = Expand(o, x) }"
    first, second = write(tmp_path / "a.onnx", text), write(tmp_path / "b.onnx", text)
    comparison = compare_files(first, second)
    assert comparison.verdict == "inconclusive"
    assert comparison.runs > 0
    assert "the input x takes (Expand takes it as a size or an axis); 0 to 1 were drawn; give --input" in str(
        comparison.reason
    )
    assert compare_files(first, second, inputs=[{"x": np.array([5])}]).verdict == "pass"


def test_models_that_need_long_axes_get_them(tmp_path: Path) -> None:
    """Nine times a kernel of 5: only lengths from 37 on are enough."""
    steps = " ".join(f"v{i + 1} = AveragePool<kernel_shape = [5]>(v{i})" for i in range(9))
    path = write(
        tmp_path / "a.onnx", f"(float[N,1,L] x) => (float[N,1,M] y) {{ v0 = Identity(x) {steps} y = Tanh(v9) }}"
    )
    assert compare_files(path, path).runs > 0
    assert {each["x"].shape[2] for each in given_or_random(path, ())} >= {64}


SEQUENCE = "(float[4,4] x) => (seq(float[2,4]) y) { s = Constant<value = int64[2] {2, 2}>() y = SplitToSequence(x, s) }"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("", "", None),
        ("y = SplitToSequence(x", "a = Neg(x) y = SplitToSequence(a", "y: it differs by"),
        ("[2] {2, 2}", "[3] {1, 1, 2}", "y: it has 3 elements instead of 2"),
        ("[2] {2, 2}", "[2] {1, 3}", r"y: it is float32 \[1, 4\] instead of float32 \[2, 4\]"),
    ],
)
def test_sequences_are_compared_element_by_element(tmp_path: Path, old: str, new: str, says: str | None) -> None:
    text = SEQUENCE.replace(old, new).replace("seq(float[2,4])", "seq(float[M,4])")
    comparison = compare_files(write(tmp_path / "a.onnx", SEQUENCE), write(tmp_path / "b.onnx", text))
    assert comparison.verdict == ("fail" if says else "pass"), comparison
    assert re.search(says or "", comparison.reason or "")


@pytest.mark.parametrize(
    ("body", "other"),
    [
        ("(float[N,4] x) => (float[N,4] y) { a = Abs(x) b = Neg(a) y = Sqrt(b) }", "Log(b)"),
        (
            "(float[1,6,4] b, float[1,1,6] s) => (int64[K,3] y) { t = Constant<value = float {9}>()"
            " i = Constant<value = float {1}>() n = Constant<value = int64 {3}>()"
            " y = NonMaxSuppression(b, s, n, i, t) }",
            "NonMaxSuppression<center_point_box = 1>(b, s, n, i, t)",
        ),
    ],
)
def test_outputs_that_never_say_anything_are_inconclusive(tmp_path: Path, body: str, other: str) -> None:
    text = f"{body.partition('y = ')[0]}y = {other} }}"
    comparison = compare_files(write(tmp_path / "a.onnx", body), write(tmp_path / "b.onnx", text))
    assert comparison.verdict == "inconclusive"
    assert "y: in the original it is empty or has no finite number" in (comparison.reason or "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(string[N] x) => (string[N] y) { y = Identity(x) }", r"x is a tensor\(string\), which .*; give --input"),
        ("(seq(float[N]) x) => (int64 y) { y = SequenceLength(x) }", r"x is a seq\(.*\), .* at random$"),
        ("(float[N] x) => (bfloat16[N] y) { y = Cast<to = 16>(x) }", r"y is a tensor\(bfloat16\), which .* Python"),
        ("(bfloat16[N] x) => (float[N] y) { y = Cast<to = 1>(x) }", r"x is a tensor\(bfloat16\), which .* Python"),
    ],
)
def test_types_that_cannot_be_run_are_named(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "a.onnx", text)
    comparison = compare_files(path, path)
    assert comparison.verdict == "inconclusive"
    assert re.search(says, comparison.reason or "")


def test_text_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", "(string[N] x) => (string[N] y) { y = Identity(x) }")
    assert compare_files(path, path, inputs=[{"x": np.array(["a", "b"])}])
