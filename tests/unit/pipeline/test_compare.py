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
