"""`cpcompile build --target openvino`: engines that share the weights of those in float32, and compute the same."""

import json
import shutil
import sys
from pathlib import Path

import jsonschema
import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result

from cpcompile.bundle.reader import Bundle, open_bundle
from cpcompile.cli import main
from cpcompile.core.cache import complete
from cpcompile.machine.memory import ProcessMemory
from cpcompile.report import SCHEMA
from cpcompile.runtime import load
from cpcompile.runtime.availability import why_not_here
from cpcompile.runtime.openvino_session import NO_BF16
from cpcompile.validation.memory import measure_engine

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'cpcompile[openvino]'")

FAST = ["--no-speed", "--no-memory", "--no-layers"]
TARGET = ["--target", "openvino", "--precision", "fp32,bf16"]
FP32, BF16 = ENGINES = ("openvino-fp32", "openvino-bf16")
MISSING = "openvino is not installed: pip install 'cpcompile[openvino]'"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def build(model: Path, *options: object) -> Path:
    """The bundle beside `model`. Its quality after 24 steps is no matter: the verdict may be fail."""
    result = run("build", model, *FAST, *options)
    assert result.exit_code in (0, 1), result.output
    built = model.with_suffix(".cpc")
    if (failed := built.with_name("model.cpc.failed")).exists():
        failed.rename(built)
    return built


def copy_of(trained: Path, folder: Path) -> Path:
    for name in ("model.pt", "model.dense.pt"):
        shutil.copy(trained.with_name(name), folder / name)
    return folder / "model.pt"


@pytest.fixture(scope="module")
def bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(build(copy_of(trained, tmp_path_factory.mktemp("openvino")), *TARGET))


def test_parity_is_that_of_float32_and_what_cannot_run_was_built(bundle: Bundle) -> None:
    report = json.loads((bundle.root / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    for context in report["contexts"]:
        cpu, fp32, bf16 = context["variants"]
        assert [each["name"] for each in (cpu, fp32, bf16)] == ["cpu-fp32", *ENGINES]
        assert fp32["status"] == "ran" and fp32["parity"]["verdict"] == "pass"
        assert fp32["parity"]["tolerance"] == pytest.approx(cpu["parity"]["tolerance"], rel=0.5)
        assert fp32["quality"]["perplexity"] == pytest.approx(cpu["quality"]["perplexity"], rel=1e-5)
        assert fp32["placement"]["verdict"] is None
        reason = why_not_here(bundle.variant(context["name"], BF16))
        assert reason in (None, NO_BF16)
        if reason is None:
            assert bf16["status"] == "ran" and bf16["parity"]["verdict"] == "pass"
        else:
            assert (bf16["status"], bf16["reason"]) == ("built", f"built, not run: {reason}")
    assert not any("bundle" in reason for reason in report["reasons"])
    assert [each["name"] for each in report["build"]["stages"]] == ["load", "capture", "freeze", "export"]


def test_the_bundle_grows_by_the_graphs_alone(bundle: Bundle) -> None:
    bundle.verify_all()
    assert len(list(bundle.root.rglob("weights.bin"))) == 1
    for context in bundle.contexts:
        cpu, *others = (bundle.variant(context, name) for name in ("cpu-fp32", *ENGINES))
        (weights,) = {each.weights for each in (cpu, *others)}
        assert weights is not None
        for each in others:
            assert {node.domain for node in each.graph().graph} == {""}
            assert each.model.stat().st_size < 60_000
            assert each.bytes - each.model.stat().st_size == cpu.bytes - cpu.model.stat().st_size


def test_it_generates_what_the_engine_in_float32_does(bundle: Bundle) -> None:
    for context in bundle.contexts:
        own, other = load(bundle, context, FP32, threads=1), load(bundle, context, "cpu-fp32", threads=1)
        prompts = ["Return the ", "a", "def main(arguments):\n    return None\n"]
        assert own.generate(prompts, max_new_tokens=24) == other.generate(prompts, max_new_tokens=24)
        assert [*own.generate([5, 7], max_new_tokens=9, stream=True)] == other.generate([5, 7], max_new_tokens=9)
        assert own.score(prompts[2]).perplexity == pytest.approx(other.score(prompts[2]).perplexity, rel=1e-4)
        own_cache, other_cache = None, None
        for ids in ([[1, 2, 3], [4, 5, 6]], [[7], [8]], [[9, 1], [2, 3]]):
            logits, own_cache = own.engine.step(ids, own_cache, logits_to_keep=1)
            expected, other_cache = other.engine.step(ids, other_cache, logits_to_keep=1)
            np.testing.assert_allclose(logits, expected, atol=1e-4)
        assert own_cache is not None and other_cache is not None and own_cache.keys() == other_cache.keys()
        for name, array in own_cache.items():
            np.testing.assert_allclose(array, other_cache[name], atol=1e-4)


def test_best_stays_the_engine_of_onnx_runtime(bundle: Bundle) -> None:
    assert load(bundle, "english").engine.variant.name == "cpu-fp32"


def test_memory_is_measured_above_the_libraries(bundle: Bundle) -> None:
    feeds = {"input_ids": np.zeros((1, 8), dtype=np.int64)}
    found = measure_engine(bundle.root, "english", FP32, feeds, threads=1)
    assert isinstance(found, ProcessMemory), found
    assert found.base_rss_bytes < found.run_peak_rss_bytes


def test_onnx_runtime_opens_the_package_and_passes_the_engines_over(bundle: Bundle) -> None:
    package = ort.ModelPackageContext(str(bundle.root))
    session = package.select_component("english", ort.ModelPackageOptions(ort.SessionOptions())).create_session(None)
    assert "com.microsoft" in {each.domain for each in bundle.variant("english", "cpu-fp32").graph().graph}
    assert session.get_modelmeta().custom_metadata_map  # of the engine with its own operators


def test_an_exported_engine_is_a_graph_of_the_standard(bundle: Bundle, tmp_path: Path) -> None:
    for name in ENGINES:
        result = run("export", bundle.root, "english", "--variant", name, "-o", tmp_path / f"{name}.onnx")
        assert result.exit_code == 0, result.output
    assert (tmp_path / f"{FP32}.onnx").read_bytes() == (tmp_path / f"{BF16}.onnx").read_bytes()
    session = ort.InferenceSession(tmp_path / f"{FP32}.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([[1, 2, 3, 4]])
    shapes = {each.name: each.shape for each in session.get_inputs()}
    (logits,) = session.run(["logits"], complete({"input_ids": ids}, shapes))
    np.testing.assert_allclose(logits, load(bundle, "english", FP32)(ids), atol=1e-4)


def test_without_openvino_the_others_are_validated(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    result = run("validate", bundle.root, *FAST, "--json")
    assert result.exit_code in (0, 1), result.output
    for context in json.loads(result.stdout)["contexts"]:
        for variant in context["variants"]:
            ran = variant["name"] == "cpu-fp32"
            assert variant["status"] == ("ran" if ran else "built")
            assert ran or variant["reason"] == f"built, not run: {MISSING}"
    result = run("run", bundle.root, "Return", "--context", "english", "--variant", FP32)
    assert result.exit_code == 1 and f"{FP32}/model.onnx: {MISSING}" in " ".join(result.output.split())
    shown = " ".join(run("inspect", bundle.root).output.split())
    assert MISSING in shown
    assert run("run", bundle.root, "Return", "--context", "english", "-n", "2").exit_code == 0


def test_without_openvino_it_is_built(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    built = build(copy_of(trained, tmp_path), "--target", "openvino", "--contexts", "english", "--standard-operators")
    monkeypatch.undo()
    bundle = open_bundle(built)
    assert [each.name for each in bundle.variants("english")] == ["cpu-fp32", BF16]  # whatever the processor has
    own, cpu = bundle.variant("english", BF16), bundle.variant("english", "cpu-fp32")
    assert (own.weights, own.model.read_bytes()) == (cpu.weights, cpu.model.read_bytes())


@pytest.mark.slow
def test_a_standalone_engine_has_its_weights_inside(trained: Path, tmp_path: Path) -> None:
    options = ("--contexts", "english", "--standalone", "--vocabulary-coverage", "1")
    bundle = open_bundle(build(copy_of(trained, tmp_path), "--target", "openvino", "--precision", "fp32", *options))
    assert bundle.variant("english", FP32).weights is None
    own, other = load(bundle, "english", FP32), load(bundle, "english", "cpu-fp32")
    assert own.generate("Return the ", max_new_tokens=20) == other.generate("Return the ", max_new_tokens=20)


@pytest.mark.slow
def test_a_baseline_has_them_like_others(bundle: Bundle, tmp_path: Path) -> None:
    arguments = ["check", bundle.root, "--baseline", tmp_path / "base.json", "--no-speed", "--no-memory"]
    assert run(*arguments, "--update-baseline").exit_code == 0
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    parity = {
        each["variant"]: each["verdict"]
        for each in json.loads(result.stdout)["outcomes"]
        if each["name"] == "parity" and each["context"] == "english"
    }
    here = why_not_here(bundle.variant("english", BF16)) is None
    assert parity == {"cpu-fp32": "pass", FP32: "pass", BF16: "pass" if here else "skipped"}
