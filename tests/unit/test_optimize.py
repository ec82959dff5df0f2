import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from cpcompile.cli import main
from cpcompile.errors import UsageError
from cpcompile.onnx_file import load_onnx, tensors_of
from cpcompile.optimize import DEFAULT, PASSES, optimize_file, parse_pass
from cpcompile.passes.bind_context import BindContext

HEAD = '<ir_version: 10, opset_import: ["" : 20]> g '
DEAD = "(float[N,4] x) => (float[N,3] y) { h = MatMul(x, a) z = Mul(h, g) y = MatMul(z, b) }"
GATE = np.array([1, 0, 2, 0, 0, 3, 0, 0], np.float32)


def write(path: Path, text: str = DEAD, **initializers: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(text if text.startswith("<") else HEAD + text)
    weights = {"a": rng.standard_normal((4, 8)), "g": GATE, "b": rng.standard_normal((8, 3))} | initializers
    for name, array in weights.items():
        if f"{name})" in text or f"{name}," in text:
            array = array.astype(np.float32) if array.dtype == np.float64 else array
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["opt", *map(str, arguments)])
    return result.exit_code, result.output


def test_dead_channels_go_and_the_outputs_stay(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = optimize_file(write(tmp_path / "in.onnx"), out, check=True)
    assert result.before.parameters == 4 * 8 + 8 + 8 * 3
    assert result.steps[-1].size.parameters == 4 * 3 + 3 + 3 * 3
    assert [step.name for step in result.steps] == list(DEFAULT)
    assert result.comparison
    assert result.comparison.runs == 3
    assert sum(t.size for t in tensors_of(load_onnx(out))) == 24
    assert result.bytes_written == out.stat().st_size


def test_functions_are_inlined(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 20, "own" : 1]> g (float[N,4] x) => (float[N,3] y) '
        '{ y = own.Gated(x, a, g, b) } <domain: "own", opset_import: ["" : 20]> '
        "Gated (x, a, g, b) => (y) { h = MatMul(x, a) z = Mul(h, g) y = MatMul(z, b) }"
    )
    path = write(tmp_path / "in.onnx", text)
    result = optimize_file(path, tmp_path / "out.onnx", check=True)
    assert result.comparison
    assert result.steps[-1].size.parameters == 24


def test_a_bound_context_is_compared_with_the_original_at_that_context(tmp_path: Path) -> None:
    text = (
        "(float[N,4] x, int64 c) => (float[N,3] y) "
        "{ h = MatMul(x, a) r = Gather(table, c) z = Mul(h, r) y = MatMul(z, b) }"
    )
    table = np.stack([GATE, GATE[::-1]])
    path = write(tmp_path / "in.onnx", text.replace("Gather(table, c)", "Gather(g, c)"), g=table)
    passes = ("bind_context:context=1:name=c", *DEFAULT)
    result = optimize_file(path, tmp_path / "out.onnx", passes, check=True)
    assert result.comparison
    assert result.steps[-1].size.parameters == 24
    assert [value.name for value in load_onnx(tmp_path / "out.onnx").graph.inputs] == ["x"]


def test_every_pass_can_be_named_and_says_what_it_does(tmp_path: Path) -> None:
    listed = CliRunner().invoke(main, ["passes"]).output.splitlines()
    assert [line.split()[0].partition(":")[0] for line in listed] == list(PASSES)
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)
    source = write(tmp_path / "in.onnx")
    for name in PASSES:
        if name != "bind_context":
            assert optimize_file(source, tmp_path / f"{name}.onnx", [name], check=True).comparison


def test_settings_of_a_pass() -> None:
    assert parse_pass("bind_context:context=3:name=lang") == BindContext(3, "lang")
    for text, says in [
        ("unroll", "there is no pass 'unroll'"),
        ("bind_context", "needs a value: bind_context:context="),
        ("bind_context:context=x", "int is needed"),
        ("clean_up:fast=1", "has no setting 'fast=1'; it has none"),
        ("bind_context:context", "has no setting 'context'"),
    ]:
        with pytest.raises(UsageError, match=says):
            parse_pass(text)


def test_the_command_prints_sizes_explains_and_dumps(tmp_path: Path) -> None:
    text = "(float[N,4] x) => (float[N,3] y) { h = MatMul(x, a) z = Mul(h, g) s = Softmax(z) y = MatMul(s, b) }"
    source, out, dump = write(tmp_path / "in.onnx", text), tmp_path / "out.onnx", tmp_path / "dump"
    passes = "eliminate_dead_channels,clean_up"
    code, output = run(source, "-o", out, "--passes", passes, "--check", "--explain", "--dump", dump)
    assert code == 0, output
    assert "it works along this axis" in " ".join(output.split())
    assert "check: pass" in output
    assert [p.name for p in sorted(dump.iterdir())] == ["01-eliminate_dead_channels.onnx", "02-clean_up.onnx"]
    code, output = run(source, "-o", out, "--check", "--json")
    report = json.loads(output[output.index("{") : output.rindex("}") + 1])
    assert code == 0
    assert report["comparison"]["verdict"] == "pass"
    assert sum(b["channels"] for b in report["blocked"]) == 5


def test_a_result_that_differs_is_not_written(tmp_path: Path) -> None:
    """Elimination assumes finite values: 0 * log(-1) is NaN in the original and absent from the result."""
    text = "(float[N,4] x) => (float[N,3] y) { h = MatMul(x, a) l = Log(h) z = Mul(l, g) y = MatMul(z, b) }"
    source, out = write(tmp_path / "in.onnx", text, g=np.eye(8)[0]), tmp_path / "out.onnx"
    out.write_bytes(b"older")
    code, output = run(source, "-o", out, "--check")
    assert code == 1
    assert "not finite" in output
    assert f"{out} was not written" in output.replace("\n", " ")
    assert out.read_bytes() == b"older"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.onnx", "-o", "out.onnx"], "missing.onnx: cannot be read"),
        (["in.onnx", "-o", "out.onnx", "--passes", "nope"], "there is no pass 'nope'"),
        (["in.onnx", "-o", "out.onnx", "--input", "in.onnx"], "is no .npz"),
        (["in.onnx", "-o", "out.onnx", "--input", "no.npz"], "no.npz: cannot be read"),
        (["in.onnx"], "Missing option '--out'"),
    ],
)
def test_usage_errors_name_the_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.onnx")
    code, output = run(*arguments)
    assert code == 2
    assert says in output
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_that_the_runtime_cannot_run_is_inconclusive(tmp_path: Path) -> None:
    head = '<ir_version: 10, opset_import: ["" : 20, "own" : 1]> g '
    text = head + "(float[N,4] x) => (float[N,4] y) { y = own.Unknown(x) }"
    code, output = run(write(tmp_path / "in.onnx", text), "-o", tmp_path / "out.onnx", "--check")
    assert code == 3
    assert "cannot load the original" in output
    assert (tmp_path / "out.onnx").exists()
