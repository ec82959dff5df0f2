import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from cpcompile.cli import main
from cpcompile.core.errors import UsageError
from cpcompile.files.onnx_file import load_onnx, tensors_of
from cpcompile.passes.bind_context import BindContext
from cpcompile.pipeline.optimize import DEFAULT, PASSES, optimize_file, parse_pass

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
    result = optimize_file(write(tmp_path / "in.onnx"), out)
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
    result = optimize_file(path, tmp_path / "out.onnx")
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
    result = optimize_file(path, tmp_path / "out.onnx", passes)
    assert result.comparison
    assert result.steps[-1].size.parameters == 24
    assert [value.name for value in load_onnx(tmp_path / "out.onnx").graph.inputs] == ["x"]


def test_every_pass_can_be_named_and_says_what_it_does(tmp_path: Path) -> None:
    listed = CliRunner().invoke(main, ["passes"]).output.splitlines()
    assert [line.split()[0].partition(":")[0] for line in listed] == list(PASSES)
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)
    source = write(tmp_path / "in.onnx")
    for name in PASSES:
        if name not in ("bind_context", "trim_vocabulary"):  # they need a value
            assert optimize_file(source, tmp_path / f"{name}.onnx", [name]).comparison


def test_settings_of_a_pass() -> None:
    assert parse_pass("bind_context:context=3:name=lang") == BindContext(3, "lang")
    for text, says in [
        ("unroll", "there is no pass 'unroll'"),
        ("bind_context", "needs a value: bind_context:context="),
        ("bind_context:context=x", "context is 'x' .*; give a whole number"),
        ("fold_constants:limit=1e3", "give a whole number"),
        ("clean_up:fast=1", "has no setting 'fast=1'; it has none"),
        ("bind_context:context", "has no setting 'context'"),
    ]:
        with pytest.raises(UsageError, match=says):
            parse_pass(text)


LANGUAGE_MODEL = """(int64[N,S] input_ids, int64 context) => (float[N,S,6] logits) {
    e = Gather(w, input_ids) r = Gather(g, context) z = Mul(e, r) h = MatMul(z, v) t = Transpose <perm = [1, 0]> (w)
    logits = MatMul(h, t) }"""
TABLES = {"w": np.arange(48.0).reshape(6, 8) - 20, "g": np.stack([GATE, GATE[::-1]]), "v": np.eye(8)[::-1].copy()}


def kept_ids(path: Path, ids: object) -> Path:
    np.save(path, np.asarray(ids))
    return path


def test_a_trimmed_vocabulary_is_compared_with_the_tokens_that_are_left(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.onnx", LANGUAGE_MODEL, **TABLES), tmp_path / "out.onnx"
    kept = kept_ids(tmp_path / "kept.npy", [1, 2, 5])
    passes = (f"trim_vocabulary:kept={kept}", "bind_context:context=1", *DEFAULT)
    ids = {"input_ids": np.array([[2, 0], [1, 1]])}
    result = optimize_file(source, out, passes, inputs=[ids])
    assert result.comparison
    assert (result.comparison.runs, result.comparison.outputs[0].max_abs_error) == (4, 0.0)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in tensors_of(load_onnx(out))}
    assert shapes == {"w": (8, 3), "r": (8,), "v": (8, 8)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "kept.npy", "out.onnx"]


@pytest.mark.parametrize("ids", [[[1, 2]], [1.5, 2.0], ["a"], [True]])
def test_kept_ids_are_whole_numbers(tmp_path: Path, ids: object) -> None:
    with pytest.raises(UsageError, match="holds something else.*give an .npy file of token ids"):
        parse_pass(f"trim_vocabulary:kept={kept_ids(tmp_path / 'kept.npy', ids)}")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        parse_pass(f"trim_vocabulary:kept={tmp_path / 'other.npy'}")


def test_every_spelling_of_an_old_model(tmp_path: Path) -> None:
    """Before IR 4 every initializer was an input too; `ai.onnx` is the standard's long name."""
    text = DEAD.replace("x)", "x, float[4,8] a, float[8] g, float[8,3] b)", 1)
    path = write(tmp_path / "in.onnx", '<ir_version: 3, opset_import: ["ai.onnx" : 13]> g ' + text)
    result = optimize_file(path, tmp_path / "out.onnx")
    assert result.comparison
    assert result.steps[-1].size.parameters == 24
    model = load_onnx(tmp_path / "out.onnx")
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert dict(model.graph.opset_imports) == {"": 13}


def test_a_file_in_an_old_opset_keeps_what_a_pass_does_not_understand(tmp_path: Path) -> None:
    source = write(tmp_path / "in.onnx", HEAD.replace("20", "11") + DEAD)
    out = tmp_path / "out.onnx"
    result = optimize_file(source, out)
    assert result.comparison
    assert result.comparison.verdict == "pass"
    assert [step.modified for step in result.steps] == [False] * len(DEFAULT)
    assert {tensor.name: tensor.size for tensor in tensors_of(load_onnx(out))} == {"a": 32, "g": 8, "b": 24}
    skipped = ["the pass canonicalize_shapes needs opset 13", "the pass eliminate_dead_channels needs opset 13"]
    assert [reason.partition(" or later")[0] for reason in result.skipped] == skipped
    assert "opset 11" in result.blocked[0].reason
    code, output = run(source, "-o", out, "--check", "--explain")
    assert code == 0
    words = " ".join(output.split())
    assert all(f"skipped: {each} or later, and the model is in opset 11; convert it first" in words for each in skipped)
    assert "no zero channel had to stay" not in words


def test_a_file_in_an_old_opset_is_not_trimmed_by_half(tmp_path: Path) -> None:
    """Skipped, the pass would leave a model that takes other token ids than were asked for."""
    source = write(tmp_path / "in.onnx", HEAD.replace("20", "11") + LANGUAGE_MODEL, **TABLES)
    kept = kept_ids(tmp_path / "kept.npy", [1, 2, 5])
    code, output = run(source, "-o", tmp_path / "out.onnx", "--passes", f"trim_vocabulary:kept={kept}")
    assert code == 1
    assert "the pass trim_vocabulary needs opset 13 or later" in " ".join(output.split())
    assert not (tmp_path / "out.onnx").exists()


def test_functions_in_subgraphs_and_in_functions_are_inlined(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "own" : 1]> m (float[N,4] x, bool c) => (float[N,3] y) {
            y = If (c) <
                then_branch = one () => (float[N,3] p) { p = own.Both <scale = 2.0> (x, a, g, b) },
                else_branch = two () => (float[N,3] q) { q = own.Gated(x, a, g, b) }
            >
        }
        <domain: "own", opset_import: ["" : 20]> Gated <scale: float = 3.0> (x, a, g, b) => (y) {
            s = Constant <value_float: float = @scale> ()
            h = MatMul(x, a) z = Mul(h, g) k = MatMul(z, b) y = Mul(k, s) }
        <domain: "own", opset_import: ["" : 20, "own" : 1]> Both <scale: float> (x, a, g, b) => (y) {
            p = own.Gated <scale: float = @scale> (x, a, g, b) q = own.Gated(x, a, g, b) y = Add(p, q) }"""
    path = write(tmp_path / "in.onnx", text)
    result = optimize_file(path, tmp_path / "out.onnx")
    assert result.comparison
    assert result.comparison.runs == 3
    assert result.steps[-1].size.parameters == 24


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


@pytest.mark.parametrize("option", [(), ("--check",)])
def test_a_result_that_differs_is_not_written(tmp_path: Path, option: tuple[str, ...]) -> None:
    """Elimination assumes finite values: 0 * log(-1) is NaN in the original and absent from the result."""
    text = "(float[N,4] x) => (float[N,3] y) { h = MatMul(x, a) l = Log(h) z = Mul(l, g) y = MatMul(z, b) }"
    source, out = write(tmp_path / "in.onnx", text, g=np.eye(8)[0]), tmp_path / "out.onnx"
    out.write_bytes(b"older")
    code, output = run(source, "-o", out, *option)
    assert code == 1
    assert "not finite" in output
    assert f"{out} was not written" in output.replace("\n", " ")
    assert out.read_bytes() == b"older"
    assert run(source, "-o", out, "--no-check")[0] == 0
    assert sum(tensor.size for tensor in tensors_of(load_onnx(out))) == 4 + 3  # the gate is a one


def test_how_much_is_compared(tmp_path: Path) -> None:
    source, runs = write(tmp_path / "in.onnx"), {}
    for level in ("none", "quick", "thorough"):
        comparison = optimize_file(source, tmp_path / "out.onnx", check=level).comparison
        runs[level] = 0 if comparison is None else comparison.runs
    assert runs == {"none": 0, "quick": 3, "thorough": 15}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.onnx", "-o", "out.onnx"], "missing.onnx: cannot be read"),
        (["in.onnx", "-o", "out.onnx", "--passes", "nope"], "there is no pass 'nope'"),
        (["in.onnx", "-o", "out.onnx", "--input", "in.onnx"], "is not an .npz"),
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
    source, out = write(tmp_path / "in.onnx", text), tmp_path / "out.onnx"
    for option, expected in ((), 0), (("--check",), 3):
        code, output = run(source, "-o", out, *option)
        assert code == expected
        assert "cannot load the original" in output
        assert out.exists()


def test_only_onnx_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, output = run(write(tmp_path / "a.onnx"), "-o", tmp_path / "notes.txt")
    assert code == 2
    assert "notes.txt: exists and is not named .onnx" in output
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_inferred_types_are_written_only_if_they_are_asked_for(tmp_path: Path) -> None:
    """They would make a small file larger than it was; what the file declared stays."""
    source = write(tmp_path / "in.onnx", DEAD.replace("{", "<float[N,8] h> {", 1))
    optimize_file(source, tmp_path / "a.onnx", ["fold_constants", "clean_up"])
    optimize_file(source, tmp_path / "b.onnx", ["fold_constants", "infer_shapes"])
    assert [value.name for value in onnx.load(tmp_path / "a.onnx").graph.value_info] == ["h"]
    assert {"h", "z"} <= {value.name for value in onnx.load(tmp_path / "b.onnx").graph.value_info}


def test_a_file_that_contradicts_itself_is_noted(tmp_path: Path) -> None:
    text = """(float[2,4] x) => (float[4,3] y) <float[2,8] c> {
        h = MatMul(x, a) c = Concat <axis = 0> (h, h) z = Mul(c, g) y = MatMul(z, b) }"""
    source, out = write(tmp_path / "in.onnx", text), tmp_path / "out.onnx"
    result = optimize_file(source, out)
    assert result.comparison
    assert result.steps[-1].size.parameters == 24
    assert list(result.contradictions) == ["c is declared as FLOAT[2,8], its operator makes FLOAT[4,8]"]
    code, output = run(source, "-o", out)
    assert code == 0
    assert "is wrong about its own values, which is not used: c is declared as FLOAT[2,8]" in " ".join(output.split())


@pytest.mark.parametrize("forget", [(), ("shape",), ("shape", "type")])
@pytest.mark.parametrize("version", [1, 3])
def test_weights_that_are_inputs_have_the_shapes_of_their_tensors(
    tmp_path: Path, version: int, forget: tuple[str, ...]
) -> None:
    text = DEAD.replace("x)", "x, float[A,B] a, float[C] g, float[D,E] b)", 1)
    path = write(tmp_path / "in.onnx", f'<ir_version: {version}, opset_import: ["" : 13]> g {text}')
    model = onnx.load(path)
    for value in list(model.graph.input)[1:]:
        if "shape" in forget:
            value.type.tensor_type.ClearField("shape")
        if "type" in forget:
            value.ClearField("type")
    onnx.save(model, path)
    result = optimize_file(path, tmp_path / "out.onnx")
    assert result.comparison
    assert result.steps[-1].size.parameters == 24


def test_a_transposed_weight_becomes_one_that_quantizers_find(tmp_path: Path) -> None:
    text = "(float[N,4] x) => (float[N,8] y) { t = Transpose(w) y = MatMul(x, t) }"
    weight = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    source, out = write(tmp_path / "in.onnx", text, w=weight), tmp_path / "out.onnx"
    result = optimize_file(source, out)
    assert result.comparison
    assert result.steps[-1].size.bytes == result.before.bytes
    model = load_onnx(out)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert np.array_equal(next(tensors_of(model)).numpy(), weight.T)
