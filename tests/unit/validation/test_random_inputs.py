"""Which whole numbers are drawn for an input: those that the graph takes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpcompile.validation.random_inputs import RandomInputs

OTHER = '<ir_version: 10, opset_import: ["" : 20, "other" : 1, "ai.onnx.ml" : 3]> g '
WEIGHTS = {
    "w": np.arange(400, dtype=np.float32).reshape(100, 4),
    "offsets": np.array([0, 10, 30]),
    **{f"n{number}": np.array(number) for number in (0, 1, 2, 3, 50, 255, 16000)},
    **{f"d{number}": np.array([number]) for number in (0, 1, 2, 7)},
    **{f"f{number}": np.array(number, np.float32) for number in (0, 1, 2, 255)},
}


def model_of(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(OTHER + text)
    for name, array in (WEIGHTS | weights).items():
        if any(f"{before}{name}{after}" in text for before in " (=" for after in ",) "):
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def drawn(model: onnx.ModelProto) -> tuple[RandomInputs, list[dict[str, np.ndarray]]]:
    """What is drawn; the model has taken it."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = RandomInputs(session, ir.from_proto(model))
    feeds = list(inputs)
    for each in feeds:
        session.run(None, each)
    return inputs, [dict(each) for each in feeds]


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ("(int64[N] x) => (float[N,4] y) { y = Gather(w, x) }", "0 to 99 (rows of w)"),
        ("(int64[N] x) => (float[100,N] y) { y = Gather<axis = -1>(w, x) }", "0 to 3 (positions on axis -1 of w)"),
        ("(int32[N] x) => (float[N,4] y) { a = Cast<to = 7>(x) b = Unsqueeze(a, d0) c = Squeeze(b, d0) "
         "y = Gather(w, c) }", "0 to 99 (rows of w)"),
        ("(int64[N] x) => (float[N,4] y) { a = Add(x, n2) y = Gather(w, a) }", "-2 to 97 (rows of w)"),
        ("(int64[N] x) => (float[N,4] y) { a = Sub(n50, x) y = Gather(w, a) }", "-49 to 50 (rows of w)"),
        ("(int64[N] x) => (float[N,4] y) { a = Mul(x, n3) y = Gather(w, a) }", "0 to 33 (rows of w)"),
        ("(int64[N] x) => (float[N,4] y) { a = Div(x, n2) y = Gather(w, a) }", "0 to 198 (rows of w)"),
        ("(int64[N,3] x) => (float[N,3,4] y) { a = Add(x, offsets) y = Gather(w, a) }", "0 to 69 (rows of w)"),
        ("(float[N] x) => (float[N,4] y) { a = Cast<to = 7>(x) y = Gather(w, a) }", "0 to 99 (rows of w)"),
        ("(int64[N,2] x) => (float[N] y) { y = GatherND(w, x) }", "0 to 3 (indices of GatherND)"),
        ("(int64[N,4] x) => (float[N,4] y) { y = GatherElements(w, x) }", "0 to 99 (rows of w)"),
        ("(int64[N] x) => (float[N,4] y) { t = Transpose<perm = [1, 0]>(w) y = Gather(t, x, ) }", None),
        ("(int64[N] x) => (float[N,3] y) { v = Constant<value_floats = [0.0, 1.0]>() y = OneHot(x, n3, v) }",
         "0 to 2 (depth of OneHot)"),
        ("(float[N,5] z, int64[M] x) => (float[M,5] y) { y = Gather(z, x) }", "0 to 7 (rows of z)"),
        ("(uint8[N] x) => (float[N] y) { a = Cast<to = 1>(x) y = Div(a, f255) }", "0 to 255 (uint8)"),
        ("(int8[N] x) => (float[N] y) { y = Cast<to = 1>(x) }", "-128 to 127 (int8)"),
        ("(bool[N] x) => (bool[N] y) { y = Not(x) }", "0 to 1 (bool)"),
        ("(int64[N] x) => (bool[N] y) { y = Cast<to = 9>(x) }", "0 to 1 (cast to bool)"),
        ("(int64[N] x) => (float[N] y) { a = Cast<to = 1>(x) y = Sub(f1, a) }", "0 to 1 (subtracted from 1)"),
        ("(int64[N] attention_mask) => (float[N] y) { y = Cast<to = 1>(attention_mask) }", "0 to 1 (named a mask)"),
        ("(int64[N] x) => (bool[N] y) { y = Equal(x, n16000) }", "15999 to 16001 (compared with constants)"),
        ("(int64[N] x) => (int64[N] y) { y = Clip(x, n0, n50) }", "-1 to 51 (compared with constants)"),
        ("(int64[N] x) => (int64[N] y) { y = Mod(x, n50) }", "-1 to 51 (compared with constants)"),
        ("(int64[N] x) => (int64[N] y) { y = Mod(n50, x) }", "1 to 127 (a divisor of Mod)"),
        ("(int64[N] x) => (float[N] y) { a = Cast<to = 1>(x) y = Tanh(a) }", "-128 to 127 (used as a number)"),
        ("(int64 x) => (int64[M] y) { y = Range(n0, x, n1) }", "1 to 4 (a size of Range)"),
        ("(int64[N] x, bool c) => (float[N,4] y) { y = If(c) "
         " <then_branch = t () => (float[N,4] p) { p = Gather(w, x) }, "
         "else_branch = e () => (float[N,4] q) { a = Add(x, n1) q = Gather(w, a) }> }", "0 to 98 (rows of w)"),
        ("(int64[N] x) => (float[N,4] y) { i, y = Loop(n2, , x, w0) "
         "<body = b (int64 k, bool on, int64[N] r, float[N,4] s) "
         "=> (bool go, int64[N] same, float[N,4] t) { go = Identity(on) same = Identity(r) g = Gather(w, r) "
         "t = Add(s, g) }> }", None),
    ],
)  # fmt: skip
def test_the_graph_says_which_numbers_an_input_takes(graph: str, expected: str | None) -> None:
    if expected is None:
        expected = "0 to 3 (rows)" if "Transpose" in graph else "0 to 99 (rows of w)"
    inputs, feeds = drawn(model_of(graph.replace("x, )", "x)").replace("w0", "f0")))
    found = {name: each for name, each in inputs.ranges.items() if name not in ("c", "z")}
    ((name, numbers),) = found.items()
    assert numbers.known
    assert f"{numbers.low} to {numbers.high} ({numbers.source})" == expected
    values = np.concatenate([each[name].astype(np.int64).reshape(-1) for each in feeds])
    assert (values.min(), values.max()) == (numbers.low, numbers.high)


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        ("(int64[1] x) => (float[M] y) { y = Expand(f1, x) }", "Expand takes it as a size or an axis"),
        ("(int64[N] x, int64[N] z) => (bool[N] y) { y = Less(x, z) }", "Less compares it with computed values"),
        ("(int64[N] x, int64[N] z) => (float[N,4] y) { a = Add(x, z) y = Gather(w, a) }", "an index of Gather"),
        ("(int64[N] x, int64[N] z) => (float[N,4] y) { a = Mul(x, z) f = Cast<to = 1>(a) i = Cast<to = 7>(f) "
         "y = Gather(w, i) }", "an index of Gather"),
    ],
)  # fmt: skip
def test_what_the_graph_does_not_say_is_said(graph: str, says: str) -> None:
    inputs, feeds = drawn(model_of(graph))
    numbers = inputs.ranges["x"]
    assert not numbers.known
    assert says in numbers.source
    assert {int(number) for each in feeds for number in each["x"].reshape(-1)} <= {0, 1}


def test_every_run_draws_other_landmarks_for_a_single_number() -> None:
    _, feeds = drawn(model_of("(int64 x) => (bool y) { y = Equal(x, n16000) }"))
    assert [int(each["x"]) for each in feeds] == [16000, 16001, 15999]


STEPS = st.lists(st.tuples(st.sampled_from(["Add", "Sub", "From", "Mul", "Neg", "Max"]), st.integers(1, 3)), max_size=4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(STEPS, st.integers(400, 600))
def test_computed_indices_stay_inside_the_table(steps: list[tuple[str, int]], rows: int) -> None:
    """`drawn` runs the model: ONNX Runtime refuses an index that is outside."""
    lines, last = ["v0 = Identity(x)"], "v0"
    for number, (operator, constant) in enumerate(steps, 1):
        operands = {"From": f"(k{constant}, {last})", "Neg": f"({last})"}.get(operator, f"({last}, k{constant})")
        operator = "Sub" if operator == "From" else operator
        lines.append(f"v{number} = {operator}{operands}")
        last = f"v{number}"
    text = f"(int64[N] x) => (float[N] y) {{ {' '.join(lines)} s = Add({last}, k0) y = Gather(table, s) }}"
    constants = {f"k{number}": np.array(number) for number in range(1, 4)} | {"k0": np.array(75)}
    inputs, _ = drawn(model_of(text, table=np.arange(rows, dtype=np.float32), **constants))
    assert inputs.ranges["x"].known
    assert "table" in inputs.ranges["x"].source


def test_old_files_whose_weights_are_inputs_too() -> None:
    model = model_of("(int64[N] x, float[R,C] w) => (float[N,4] y) { y = Gather(w, x) }")
    model.ir_version = 3
    model.opset_import[0].version = 8
    inputs, _ = drawn(model)
    assert str(inputs.ranges["x"]) == "x: 0 to 99 (rows of w)"
