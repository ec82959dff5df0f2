"""`cpcompile compare`: any two ONNX files."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from cpcompile.cli import main

WEIGHT = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


def write(path: Path, weight: np.ndarray = WEIGHT, repeats: int = 1) -> Path:
    """y = tanh(x w … w), `repeats` products."""
    steps = "".join(f"a{i + 1} = MatMul(a{i}, w) " for i in range(repeats))
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[N,64] x) => (float[N,64] y) {{ a0 = Identity(x) {steps}'
    model = onnx.parser.parse_model(f"{text} y = Tanh(a{repeats}) }}")
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_a_file_and_its_copy(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx")
    result = run(a, b, "--rounds", 3, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["verdict"] == "pass" and found["original"] == found["candidate"]
    (output,) = found["outputs"]["outputs"]
    assert (output["max_abs_error"], output["ratios"]["cosine"], output["ratios"]["sqnr_db"]) == (0, 1, None)
    (shape,) = found["speed"]["shapes"]
    assert 0 < shape["ratio_low"] <= shape["ratio"] <= shape["ratio_high"]


def test_another_function_fails_and_is_not_timed(tmp_path: Path) -> None:
    other = write(tmp_path / "b.onnx", WEIGHT * np.float32(1.001))
    result = run(write(tmp_path / "a.onnx"), other, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["speed"]["shapes"] is None and "y: it differs by" in found["speed"]["not_measured"]["shapes"]
    assert 50 < found["outputs"]["outputs"][0]["ratios"]["sqnr_db"] < 80
    shown = run(tmp_path / "a.onnx", other)
    assert shown.exit_code == 1 and "verdict: fail" in shown.output and "y: it differs by" in shown.output


def test_given_inputs_are_compared_and_timed(tmp_path: Path) -> None:
    a = write(tmp_path / "a.onnx")
    np.savez(tmp_path / "in.npz", x=np.zeros((9, 64), dtype=np.float32))
    result = run(a, a, "--input", tmp_path / "in.npz", "--rounds", 2, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["outputs"]["runs"] == 4
    assert found["speed"]["shapes"][0]["batch"] == 9


def test_a_demanded_ratio_gates(tmp_path: Path) -> None:
    """Sixty products with one matrix of ones on the diagonal are as good as one; a busy machine may leave it open."""
    slow, fast = write(tmp_path / "slow.onnx", np.eye(64, dtype=np.float32), 60), tmp_path / "fast.onnx"
    write(fast, np.eye(64, dtype=np.float32))
    quick = ["--rounds", 5, "--min-speed-ratio", 1.5]
    assert run(slow, fast, *quick).exit_code in (0, 3)
    result = run(fast, slow, *quick)
    assert result.exit_code in (1, 3) and "times as fast as the original" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("content", "says"), [(None, "No such file"), (b"garbage", "is not a valid ONNX model"), (b"", "holds no graph")]
)
def test_what_is_no_model_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    bad = tmp_path / "bad.onnx"
    if content is not None:
        bad.write_bytes(content)
    for pair in ((write(tmp_path / "a.onnx"), bad), (bad, tmp_path / "a.onnx")):
        result = run(*pair)
        assert result.exit_code == 2 and str(bad) in result.output and says in result.output, result.output


def write_table(path: Path, text: str, rows: np.ndarray) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g {text}')
    model.graph.initializer.append(onnx.numpy_helper.from_array(rows, "w"))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("command", [["compare", "a", "b"], ["check", "b", "--baseline", "a"]])
def test_other_embeddings_from_row_2_on_fail(tmp_path: Path, command: list[str]) -> None:
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    text = "(int64[N] ids) => (float[N,4] y) { y = Gather(w, ids) }"
    write_table(tmp_path / "a.onnx", text, rows)
    write_table(tmp_path / "b.onnx", text, np.where(np.arange(10)[:, None] < 2, rows, -rows).astype(np.float32))
    arguments = [str(tmp_path / f"{each}.onnx") if each in "ab" else each for each in command]
    result = CliRunner().invoke(main, [*arguments, "--no-speed"])
    assert result.exit_code == 1 and "y: it differs by" in " ".join(result.output.split()), result.output
    if command[0] == "compare":
        assert "drawn: ids: 0 to 9 (rows of w)" in result.output


def test_unknown_ranges_are_inconclusive_without_input(tmp_path: Path) -> None:
    text = "(int64[1] x, float[4] z) => (float[M] y) { a = Add(z, w) s = ReduceSum<keepdims = 0>(a) y = Expand(s, x) }"
    a = write_table(tmp_path / "a.onnx", text, WEIGHT[0, :4])
    np.savez(tmp_path / "in.npz", x=np.array([3]), z=np.ones(4, np.float32))
    for command in (["compare", a, a], ["check", a, "--baseline", a]):
        arguments = [*map(str, command), "--no-speed"]
        result = CliRunner().invoke(main, arguments)
        words = " ".join(result.output.split())
        assert result.exit_code == 3 and "does not say which numbers the input x takes" in words, result.output
        assert CliRunner().invoke(main, [*arguments, "--input", str(tmp_path / "in.npz")]).exit_code == 0


def test_inputs_are_for_files(tmp_path: Path) -> None:
    arguments = ["check", "model.cpc", "--baseline", "base.json", "--input", str(tmp_path / "in.npz")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "--input is for .onnx files" in result.output
