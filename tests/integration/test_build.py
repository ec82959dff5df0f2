"""`cpcompile build`, `validate` and `export` on a trained nano model: the bundle, its report, and what can go wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer

from cpcompile.bundle.reader import open_bundle
from cpcompile.cli import main
from cpcompile.core.cache import complete
from cpcompile.core.selection import UnitKind
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.report import SCHEMA
from cpcompile.report.formats import NO_FAILURE, gaps
from cpcompile.runtime import load_all
from cpcompile.runtime.engine import load_engine
from cpcompile.text.tokenization import parse_tokenizer

FAST = ["--no-speed", "--no-memory", "--no-layers"]
TWO = ["--contexts", "cpp,python"]
IDS = np.arange(34, dtype=np.int64).reshape(2, 17) * 11 % 500


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(measured: Path) -> Path:
    return measured / "model.pt"


@pytest.fixture(scope="module")
def bundle(measured: Path) -> Path:
    return measured / "model.cpc"


def test_the_report_follows_its_schema(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    for context in report["contexts"]:
        (variant,) = context["variants"]
        assert variant["status"] == "ran"
        assert variant["parity"]["verdict"] == "pass"
        assert variant["parity"]["max_abs_error"] <= 1e-4
        assert variant["memory"]["run_peak_rss_bytes"] < variant["memory"]["eager_run_peak_rss_bytes"]
        assert [list(shape["peers"]) for shape in variant["speed"]["shapes"]] == [["onnx-dense"]] * 3
        assert 0 < variant["quality"]["coherence_error"] < 0.5 > variant["quality"]["coherence_difference_error"] >= 0
        layers, found = variant["divergence"]["layers"], variant["divergence"]
        assert found["sentence"] is None and found["not_measured"]["sentence"] == NO_FAILURE
        assert NO_FAILURE not in {reason for _, reason in gaps(report)}
        assert {"layers.0", "layers.1", "norm"} <= {layer["module"] for layer in layers}
        assert all(layer["max_abs_error"] <= 1e-4 * layer["largest"] for layer in layers)
        assert variant["quality"]["perplexity"] == pytest.approx(
            report["training"]["controls"]["partition"]["perplexity"][context["name"]], rel=1e-3
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # by torch's compiler
def test_peers_are_run_beside_the_engines(model: Path, tmp_path: Path) -> None:
    """Also where the engine has a part of the vocabulary and the peers have it whole."""
    arguments = [
        "--contexts",
        "python",
        "--vocabulary-coverage",
        1,
        "--peers",
        "all",
        "--no-memory",
        "--no-layers",
        "--rounds",
        2,
    ]
    result = run("build", model, "-o", tmp_path / "m.cpc", "--json", *arguments)
    assert result.exit_code in (0, 1, 3), result.output
    report = json.loads((open_bundle(next(tmp_path.glob("m.cpc*"))).root / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    (variant,) = report["contexts"][0]["variants"]
    peers = {peer["name"]: peer for peer in variant["peers"]}
    assert {name: (peer["computes"], peer["status"], peer["reason"]) for name, peer in peers.items()} == {
        "torch-compile": ("dense", "ran", None),
        "onnx-dense": ("dense", "ran", None),
        "onnx-dynamic": ("context", "ran", None),
        "openvino": ("context", "ran", None),
    }
    assert peers["onnx-dynamic"]["parity"]["verdict"] == peers["openvino"]["parity"]["verdict"] == "pass"
    for shape in variant["speed"]["shapes"]:
        assert set(shape["peers"]) == set(peers)


def test_an_unknown_peer_and_a_ratio_that_cannot_be(model: Path, bundle: Path) -> None:
    result = run("validate", bundle, "--model", model, "--peers", "tvm")
    assert result.exit_code == 2 and "there is no peer 'tvm'; there are onnx-dense, torch-compile" in result.output
    result = run("validate", bundle, "--model", model, "--min-speed-ratio", -1)
    assert result.exit_code == 2 and "cannot be negative" in result.output


def test_one_engine_serves_all_contexts(model: Path, tmp_path: Path) -> None:
    result = run("build", model, "-o", tmp_path / "m.cpc", "--merged", "--json", *FAST)
    assert result.exit_code in (0, 1, 3), result.output
    opened = open_bundle(next(tmp_path.glob("m.cpc*")))
    report = json.loads((opened.root / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    for context in report["contexts"]:
        assert [(v["name"], v["parity"]["verdict"]) for v in context["variants"]] == [
            ("cpu-fp32", "pass"),
            ("cpu-fp32-merged", "pass"),
        ]
    assert opened.contexts == ("cpp", "english", "python")
    engines = {c: load_engine(opened, c, "cpu-fp32-merged") for c in opened.contexts}
    assert len({engine.variant.model for engine in engines.values()}) == 1
    logits = {context: engine.run(IDS) for context, engine in engines.items()}
    for context in opened.contexts:
        assert np.abs(logits[context] - load_engine(opened, context).run(IDS)).max() <= 1e-5
        own = load_engine(opened, context)
        assert engines[context].has_cache and own.has_cache
        for prompt in ([5, 6, 7], [1]):
            texts = [list(engine.generate(prompt, tokens=16)) for engine in (own, engines[context])]
            assert texts[0] == texts[1]
    assert np.abs(logits["cpp"] - logits["python"]).max() > 1e-3
    with load_all(opened, "cpu-fp32-merged") as loaded:
        assert len({id(loaded[context].engine.session) for context in opened.contexts}) == 1
        for context in opened.contexts:
            assert np.array_equal(loaded[context](IDS), logits[context])
    for form, out in (("onnx", "cpp.onnx"), ("genai", "genai"), ("triton", "repository")):
        result = run(
            "export", opened.root, "cpp", "--variant", "cpu-fp32-merged", "--format", form, "-o", tmp_path / out
        )
        assert result.exit_code == 2 and "export the engine of the context alone" in result.output, result.output
        assert not (tmp_path / out).exists()
    weights = {path.name: path.stat().st_size for path in opened.root.rglob("*") if path.is_file()}
    assert engines["cpp"].variant.bytes <= weights["weights.bin"] + 200_000


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--standalone"], "leave out --standalone"), (["--contexts", "cpp"], "there is only cpp")],
)
def test_what_cannot_be_merged_is_refused(model: Path, tmp_path: Path, flags: list[str], says: str) -> None:
    result = run("build", model, "-o", tmp_path / "m.cpc", "--merged", *flags)
    assert result.exit_code == 2
    assert says in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_each_context_can_have_the_vocabulary_that_its_text_needs(
    model: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    result = run("build", model, "-o", tmp_path / "small.cpc", "--vocabulary-coverage", 0.9, *TWO, *FAST, "--json")
    assert result.exit_code in (0, 1), result.output
    report = json.loads(result.stdout)
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    (built,) = tmp_path.iterdir()
    bundle, checkpoint = open_bundle(built), load_checkpoint(model)
    whole = parse_tokenizer(checkpoint.tokenizer)
    text = (corpus_folder / "english").read_text() if (corpus_folder / "english").is_file() else "Return the sum.\n é"
    kept = {}
    for context in report["contexts"]:
        name = context["name"]
        index = checkpoint.contexts.index(name)
        (variant,) = context["variants"]
        ids = bundle.token_ids(name)
        assert ids is not None
        kept[name] = len(ids)
        assert variant["parity"]["verdict"] == "pass"
        assert 0.5 < variant["quality"]["perplexity"] / variant["quality"]["dense_perplexity"] < 2
        assert context["parameters"]["removed_by_kind"]["vocabulary"] == (512 - len(ids)) * checkpoint.config.width
        tokenizer = Tokenizer.from_file(str(bundle.tokenizer(name)))
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        # A token of the context means the same to both: the engine's logits are those of the eager model's rows.
        new = np.arange(10, dtype=np.int64)[None] * 7
        assert [tokenizer.id_to_token(int(i)) for i in new[0]] == [whole.id_to_token(int(i)) for i in ids[new[0]]]
        with torch.no_grad():
            expected = checkpoint.model(torch.from_numpy(ids[new]), torch.tensor(index)).numpy()[..., ids]
        assert np.abs(load_engine(bundle, name).run(new) - expected).max() <= 1e-4
    assert max(kept.values()) < 512
    assert len(set(kept.values())) > 1
    again = run("validate", built, "--model", model, *FAST, "--json")
    assert (
        json.loads(again.stdout)["contexts"][0]["variants"][0]["parity"]
        == report["contexts"][0]["variants"][0]["parity"]
    )


@pytest.mark.parametrize(
    ("coverage", "says"),
    [("0", "above 0 and at most 1"), ("1.5", "above 0 and at most 1"), ("nan", "a finite number is needed")],
)
def test_a_coverage_is_a_part(model: Path, tmp_path: Path, coverage: str, says: str) -> None:
    result = run("build", model, "-o", tmp_path / "x.cpc", "--vocabulary-coverage", coverage)
    assert result.exit_code == 2
    assert says in result.output


def test_every_parameter_is_accounted_for(bundle: Path, model: Path) -> None:
    dense = load_checkpoint(model.with_name("model.dense.pt")).state
    for context, parameters in open_bundle(bundle).metadata["parameters"].items():
        assert (
            parameters["total"]
            == parameters["kept"] + parameters["removed"]
            == sum(v[0] for v in parameters["by_name"].values())
        )
        assert parameters["total"] == sum(tensor.numel() for tensor in dense.values())
        assert sum(parameters["removed_by_kind"].values()) == parameters["removed"]
        (variant,) = open_bundle(bundle).variants(context)
        stored = onnx.load(variant.model, load_external_data=False).graph.initializer
        external = sum(int(np.prod(t.dims)) for t in stored if t.data_location == onnx.TensorProto.EXTERNAL)
        assert external == parameters["kept"]


def test_engines_equal_the_masked_eager_model(bundle: Path, model: Path) -> None:
    checkpoint = load_checkpoint(model)
    eager = checkpoint.model
    for index, context in enumerate(checkpoint.contexts):
        with torch.no_grad():
            expected = eager(torch.from_numpy(IDS), torch.tensor(index)).numpy()
        assert np.abs(load_engine(open_bundle(bundle), context).run(IDS) - expected).max() <= 1e-4


def test_what_contexts_share_is_stored_once(bundle: Path, model: Path) -> None:
    checkpoint = load_checkpoint(model)
    assert checkpoint.selection is not None
    (weights,) = bundle.glob("shared_assets/*/weights.bin")
    config = checkpoint.config
    group = config.heads // config.kv_heads * config.head_dim
    ffn = int(checkpoint.selection.kept[UnitKind.FFN].any(axis=0).sum()) * config.align * config.width * 3
    heads = (
        int(checkpoint.selection.kept[UnitKind.HEAD].any(axis=0).sum())
        * (2 * group + 2 * config.head_dim)
        * config.width
    )
    rest = (config.vocabulary + 2 * config.layers + 1) * config.width
    assert 0 <= weights.stat().st_size - 4 * (ffn + heads + rest) < 64 * 100


def test_plain_onnxruntime_opens_every_context(bundle: Path, tmp_path: Path) -> None:
    """A process that never imports cpcompile or torch; it gives an empty cache."""
    np.save(tmp_path / "ids.npy", IDS)
    code = f"""
import sys, numpy as np, onnxruntime as ort
package = ort.ModelPackageContext({str(bundle)!r})
options = ort.ModelPackageOptions(ort.SessionOptions())
ids = np.load({str(tmp_path / "ids.npy")!r})
for name in package.get_component_names():
    session = package.select_component(name, options).create_session(None)
    feeds = {{"input_ids": ids}}
    if "position_ids" in (inputs := {{each.name: each.shape for each in session.get_inputs()}}):
        feeds["attention_mask"] = np.ones(ids.shape, np.int64)
        feeds["position_ids"] = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
        feeds["logits_to_keep"] = np.array(0)
        for past in (shape for shape in inputs if shape.startswith("past")):
            _, heads, _, head_dim = inputs[past]
            feeds[past] = np.zeros((len(ids), heads, 0, head_dim), np.float32)
    np.save({str(tmp_path)!r} + "/" + name, session.run(["logits"], feeds)[0])
assert not {{"cpcompile", "torch"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    opened = open_bundle(bundle)
    for context in opened.contexts:
        logits = np.load(tmp_path / f"{context}.npy")
        assert np.array_equal(logits, load_engine(opened, context).run(IDS))


@pytest.mark.slow
def test_both_opsets_and_standalone_give_the_same(bundle: Path, model: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    for name, flags in {"old.cpc": ["--opset", "20"], "alone.cpc": ["--standalone"]}.items():
        result = run("build", model, "-o", tmp_path / name, *flags, *TWO, *FAST)
        assert result.exit_code in (0, 1), result.output
        built = next(tmp_path.glob(f"{name}*"))
        for context in ("cpp", "python"):
            expected = load_engine(opened, context).run(IDS)
            assert np.abs(load_engine(open_bundle(built), context).run(IDS) - expected).max() <= 1e-4
    alone = next(tmp_path.glob("alone.cpc*"))
    assert not list(alone.glob("shared_assets/*/weights.bin"))


def test_export_writes_one_self_contained_file(bundle: Path, tmp_path: Path) -> None:
    result = run("export", bundle, "english", "-o", tmp_path / "english.onnx")
    assert result.exit_code == 0, result.output
    onnx.checker.check_model(tmp_path / "english.onnx", full_check=True)
    session = ort.InferenceSession(tmp_path / "english.onnx")
    inputs = {each.name: each.shape for each in session.get_inputs()}
    (logits,) = session.run(["logits"], complete({"input_ids": IDS}, inputs))
    assert np.array_equal(logits, load_engine(open_bundle(bundle), "english").run(IDS))


def test_a_part_of_the_contexts_can_be_built_in_standard_operators(model: Path, bundle: Path, tmp_path: Path) -> None:
    flags = ("--contexts", "python,cpp", "--standard-operators")
    result = run("build", model, "-o", tmp_path / "part.cpc", *flags, *FAST)
    assert result.exit_code in (0, 1), result.output
    part, whole = open_bundle(next(tmp_path.glob("part.cpc*"))), open_bundle(bundle)
    assert set(part.contexts) == {"python", "cpp"}
    domains = [{node.domain for node in each.variants("python")[0].graph().graph} for each in (part, whole)]
    assert domains == [{""}, {"", "com.microsoft"}]
    logits = [load_engine(each, "python").run(IDS) for each in (part, whole)]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4


def test_without_a_dense_baseline_quality_is_null_with_the_reason(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "model.pt")
    result = run("build", tmp_path / "model.pt", *FAST, "--json")
    assert result.exit_code == 3, result.output
    report = json.loads((tmp_path / "model.cpc" / "report.json").read_text())
    quality = report["contexts"][0]["variants"][0]["quality"]
    assert quality["dense_perplexity"] is None
    assert "no dense baseline" in quality["not_measured"]["dense_perplexity"]
    assert report["verdict"] == "inconclusive"


@pytest.mark.slow
def test_validate_measures_a_bundle_anew(model: Path, corpus_folder: Path, tmp_path: Path) -> None:
    arguments = ("-o", tmp_path / "model.cpc", "--contexts", "python")
    assert run("build", model, *arguments, *FAST).exit_code in (0, 1)
    bundle = next(tmp_path.glob("model.cpc*"))
    text = (bundle / "report.json").read_text()
    before = json.loads(text)
    result = run("validate", bundle, "--model", model, *FAST, "--json")
    assert result.exit_code in (0, 1), result.output
    part = json.loads(result.stdout)
    assert part["contexts"][0]["variants"][0]["parity"] == before["contexts"][0]["variants"][0]["parity"]
    assert (bundle / "report.json").read_text() == text  # a part does not replace the whole
    assert "report.json is unchanged" in result.stderr
    elsewhere = run("validate", bundle, "--model", model, "--rounds", 2, "--no-layers", "--data", corpus_folder)
    assert elsewhere.exit_code in (0, 1), elsewhere.output
    after = json.loads((bundle / "report.json").read_text())
    jsonschema.validate(after, json.loads(SCHEMA.read_text()))
    assert after["build"] == before["build"]
    (bundle / "report.json").write_text('{"build": {"seconds": "long", "peak_rss_bytes": 1, "stages": []}}')
    assert "has no report of its build" in run("validate", bundle, "--model", model, *FAST, "--json").stdout
    (bundle / "report.json").write_text(text)
    # Where nothing can be written, what was measured is still shown.
    (bundle / "report.json").unlink()
    (bundle / "report.json").mkdir()
    shown = run("validate", bundle, "--model", model, "--rounds", 2, "--json")
    (bundle / "report.json").rmdir()
    (bundle / "report.json").write_text(text)
    assert shown.exit_code == 2
    assert json.loads(shown.stdout)["contexts"]
    assert "report.json: is a folder" in shown.stderr


def test_checkpoints_of_other_runs_are_refused(model: Path, bundle: Path, tmp_path: Path) -> None:
    plain = torch.load(model, weights_only=True)
    plain["training"]["run"] = "0" * 64
    torch.save(plain, tmp_path / "model.pt")
    result = run("validate", bundle, "--model", tmp_path / "model.pt", *FAST)
    assert result.exit_code == 2
    assert "was not built from" in result.output
    for dense in (model.with_name("model.dense.pt"), model):  # of another run, and no dense one
        shutil.copy(dense, tmp_path / "model.dense.pt")
        result = run("build", tmp_path / "model.pt", *FAST)
        assert result.exit_code == 2
        assert "is not the dense baseline that was trained with" in result.output
    shutil.copy(model, tmp_path / "model.pt")
    assert run("build", tmp_path / "model.pt", *FAST).exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.dense.pt", "model.pt"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer", "{}"),
        ("training", {"perplexity": {"partition": 3}}),
        ("training", {"perplexity": {"partition": {}}}),
    ],
)
def test_a_checkpoint_with_a_malformed_record_is_refused(
    model: Path, tmp_path: Path, field: str, value: object
) -> None:
    plain = torch.load(model, weights_only=True)
    torch.save(plain | {field: value}, tmp_path / "model.pt")
    result = run("build", tmp_path / "model.pt", *FAST)
    assert result.exit_code == 2
    assert "is malformed" in result.output


@pytest.mark.slow
def test_kill_9_during_a_build_leaves_the_old_bundle(bundle: Path, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.cpc"
    shutil.copytree(bundle, target)
    command = [sys.executable, "-m", "cpcompile", "build", str(model), "-o", str(target), "--contexts", "python"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".model.cpc.building-*")) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".model.cpc.building-*"))) == 1
    opened = open_bundle(target)
    opened.verify_all()
    assert load_engine(opened, "english").run(IDS).shape == (2, 17, 512)
    assert run("build", model, "-o", target, *FAST).exit_code in (0, 1)
    assert not list(tmp_path.glob(".model.cpc.building-*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", "weights.bin: differs from what was built"),
        ("missing", "weights.bin: is missing"),
        ("truncate", "model.onnx: differs from what was built"),
    ],
)
def test_a_damaged_bundle_is_named_and_refused(
    bundle: Path, model: Path, tmp_path: Path, damage: str, message: str
) -> None:
    damaged = tmp_path / "model.cpc"
    shutil.copytree(bundle, damaged)
    (weights,) = damaged.glob("shared_assets/*/weights.bin")
    graph = damaged / "english" / "cpu-fp32" / "model.onnx"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(bytes(data))
    elif damage == "missing":
        weights.unlink()
    else:
        graph.write_bytes(graph.read_bytes()[:-100])
    for command in (
        ["validate", damaged, "--model", model, *FAST],
        ["export", damaged, "english", "-o", tmp_path / "x.onnx"],
    ):
        result = run(*command)
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "x.onnx").exists()


def test_errors_of_the_command_line(model: Path, bundle: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "model.pt"
    truncated.write_bytes(model.read_bytes()[:5000])
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("mine")
    (tmp_path / "config.toml").write_text("[train]\nsteps = 5\n")
    (tmp_path / "validate.toml").write_text("[validate]\nshapes = [[1]]\n")
    (tmp_path / "deep.toml").write_text("x = " + "[" * 5000)
    (tmp_path / "huge.toml").write_text(f"[train]\nlearning_rate = {10**400}\n")
    cases = {
        ("build", truncated): "model.pt: is truncated; copy or train it again",
        ("build", tmp_path / "evil.pt"): "evil.pt: ",
        ("build", tmp_path / "nowhere.pt"): "no such file",
        ("build", model.with_name("model.dense.pt")): "dense checkpoint and has no contexts",
        ("build", model, "--contexts", "klingon"): "no context 'klingon'; it has cpp, english, python",
        ("build", model, "-o", tmp_path / "folder"): "exists and is not a bundle",
        ("validate", tmp_path / "folder"): "is not a bundle",
        ("export", bundle, "klingon"): "no context 'klingon'",
        ("export", bundle, "english", "--variant", "tpu"): "no variant 'tpu'; it has cpu-fp32",
        ("export", bundle, "english", "-o", tmp_path / "config.toml"): "config.toml: exists and is not named .onnx",
        ("export", bundle, "english", "-o", "/dev/null"): "/dev/null: is not a regular file",
        ("export", bundle, "english", "-o", bundle / "english.onnx"): "lies in the bundle",
        ("export", bundle, "english", "-o", tmp_path): "is a folder",
        ("build", ""): "is a folder",
        ("build", model, "--contexts", ","): "names nothing",
        ("build", model, "-o", "/"): "choose another output",
        ("validate", bundle, "--model", tmp_path / "nowhere.pt"): "--model names the model",
        ("train", "--data", tmp_path, "-o", tmp_path / "evil.pt"): "It stays as it is: choose another --out",
        ("train", "--data", tmp_path, "-o", tmp_path / "config.toml"): "config.toml: exists and is not named .pt",
        ("train", "--data", tmp_path, "-o", tmp_path / "m.safetensors"): "m.safetensors: is not named .pt",
        ("train", "--data", tmp_path, "--text-field", ""): "--text-field is empty",
        ("train", "--data", tmp_path, "--controls", ","): "names nothing",
        ("build", model, "-o", tmp_path / "model.onnx"): "a bundle is a folder; give a name such as model.cpc",
        ("build", model, "--max-perplexity-increase", "-1"): "max_perplexity_increase is -1.0: it cannot be negative",
        ("build", model, "--max-perplexity-increase", "nan"): "a finite number is needed",
        ("validate", bundle, "--no-speed", "--peers", "all"): "needs timings: leave out --no-speed or --peers",
        (
            "validate",
            bundle,
            "--config",
            tmp_path / "validate.toml",
        ): "validate.toml: validate.shapes[0] is [1]",
        ("report", bundle, "-o", tmp_path / "x.pdf"): "x.pdf: is not named .html",
        ("export", bundle, "english", "-o", tmp_path / "english.ort"): "english.ort: is not named .onnx",
        ("compare", model, model, "--no-speed", "--min-speed-ratio", "2"): "speed is not measured",
        ("train", "--data", tmp_path, "-o", tmp_path / "folder"): "folder: is a folder",
        ("train", "--data", tmp_path, "-o", ""): "is a folder",
        ("train", "--data", tmp_path, "-o", tmp_path / "new.pt"): "where every file is text",
        ("train", "--data", tmp_path, "--config", tmp_path / "deep.toml"): "deep.toml: is not valid TOML",
        ("train", "--data", tmp_path, "--config", tmp_path / "huge.toml"): "train.learning_rate: is beyond",
        ("train", "--data", tmp_path, "--seed", 10**30): "train.seed: is beyond",
        ("train", "--data", tmp_path / "nowhere"): "nowhere",
        ("train", "--data", tmp_path, "--steps", "1"): "train.steps",
        ("train", "--data", tmp_path, "--ffn-budget", "0"): "budget",
        ("train", "--data", tmp_path, "--controls", "magic"): "'magic' is none of",
        ("train", "--data", tmp_path, "--config", tmp_path / "x.toml"): "x.toml: cannot be read",
        ("train",): "Missing option '--data'",
        ("train", "--data", tmp_path, "--preset", "huge"): "'huge' is not one of",
    }
    for arguments, message in cases.items():
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.output.split()), (arguments, result.output)
        assert "Traceback" not in result.output
    assert (tmp_path / "folder" / "precious").read_text() == "mine"
    assert (tmp_path / "config.toml").read_text() == "[train]\nsteps = 5\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_a_sentence(bundle: Path, model: Path, corpus_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the same writes fail, with EFBIG instead of ENOSPC."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1)); "
        "from cpcompile.cli import main; main(sys.argv[2:])"
    )
    train = ["train", "--data", corpus_folder, "--preset", "nano", "--steps", 2, "--sequence", 16]
    for limit, command in {
        50_000: ["export", bundle, "english", "-o", tmp_path / "x.onnx"],
        60_000: ["build", model, "-o", tmp_path / "x.cpc", *FAST],
        700_000: [*train, "-o", tmp_path / "x.pt", "--cache", tmp_path / "cache"],
    }.items():
        arguments = [sys.executable, "-c", limited, str(limit), *map(str, command)]
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 1, (command, result.stderr)
        assert "File too large" in result.stderr or "disk" in result.stderr, (command, result.stderr)
        assert "free space or choose another" in result.stderr, (command, result.stderr)
        assert "Traceback" not in result.stderr, (command, result.stderr)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "x.pt.work"}


@pytest.mark.parametrize("command", [[], ["train"], ["build"], ["validate"], ["export"], ["demo"]])
def test_help_has_examples(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "cpcompile " + (command[0] if command else "train") in result.output


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cpcompile", "--debug", "build", str(tmp_path / "nowhere.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "Traceback" in done.stderr
