"""`cpcompile build --target`: plans beside engines of the CPU, what the report says of them, what can go wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result

from cpcompile.bundle.reader import open_bundle
from cpcompile.cli import main
from cpcompile.core.cache import complete
from cpcompile.core.errors import CpcompileError
from cpcompile.machine.gpu import gpu_model
from cpcompile.report import SCHEMA
from cpcompile.runtime.engine import Engine, create_session, load_engine, session_options
from cpcompile.targets.plan_info import TensorInfo

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'cpcompile[tensorrt-rtx]'")

FAST = ["--no-speed", "--no-memory", "--no-layers"]
TARGET = ["--target", "tensorrt-rtx", "--contexts", "english"]
ENGINES = ("tensorrt-rtx-fp32", "tensorrt-rtx-fp16", "tensorrt-rtx-bf16", "tensorrt-rtx-int4-weights")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    for name in ("model.pt", "model.dense.pt"):
        shutil.copy(trained.with_name(name), folder / name)
    return folder / "model.pt"


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    """Its quality after 24 steps is no matter: the verdict may be fail."""
    target = ["--target", "tensorrt-rtx=sm86,sm89,sm120", "--precision", "fp32,fp16,bf16,int4-weights"]
    result = run("build", model, *FAST, *target, "--profile", "batch=1:2:4")
    assert result.exit_code in (0, 1), result.output
    built = model.with_suffix(".cpc")
    failed = built.with_name("model.cpc.failed")
    if failed.exists():
        failed.rename(built)
    return built


def test_the_report_says_that_plans_were_built_and_not_run(bundle: Path) -> None:
    if gpu_model() is not None:
        pytest.skip("there is a GPU here")
    report = json.loads((bundle / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert len(report["contexts"]) == 3
    for context in report["contexts"]:
        assert [variant["name"] for variant in context["variants"]] == ["cpu-fp32", *ENGINES]
        for variant in context["variants"][1:]:
            assert (variant["status"], variant["reason"]) == ("built", "built, not run: no NVIDIA GPU")
            assert variant["parity"]["verdict"] == "inconclusive" and variant["parity"]["max_abs_error"] is None
            assert variant["bytes"] == (bundle / context["name"] / variant["name"] / "engine.plan").stat().st_size
    shown = run("report", bundle).output
    assert "built, not run: no NVIDIA GPU" in " ".join(shown.split())
    assert "of the engines that ran; 12 of 15 were built and not run" in " ".join(shown.split())
    assert not any("bundle" in reason for reason in report["reasons"])  # plans are not the weights that are shared


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_engines_of_cuda_are_built_and_compute_the_same(model: Path, tmp_path: Path, precision: str) -> None:
    """Without a GPU their graphs run on the CPU, which has kernels or conversions for half precision too."""
    target = ["--target", "cuda", "--precision", precision, "--contexts", "english"]
    assert run("build", model, "-o", tmp_path / "m.cpc", *FAST, *target).exit_code in (0, 1)
    bundle = open_bundle(next(tmp_path.glob("m.cpc*")))
    bundle.verify_all()
    variant = bundle.variant("english", f"cuda-{precision}")
    report = json.loads((bundle.root / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    built = report["contexts"][0]["variants"][1]
    assert (built["name"], built["precision"]) == (f"cuda-{precision}", precision)
    if gpu_model() is None:
        assert (built["status"], built["reason"]) == ("built", "built, not run: no NVIDIA GPU")
    size = bundle.variant("english", "cpu-fp32").bytes
    assert variant.bytes < size * (0.7 if precision == "fp16" else 1.1)
    here = dataclasses.replace(variant, provider="CPUExecutionProvider", provider_options={})
    feeds = {"input_ids": np.arange(32, dtype=np.int64).reshape(2, 16)}
    logits = Engine(here, create_session(here, session_options(here))).outputs(feeds)["logits"]
    expected = load_engine(bundle, "english").outputs(feeds)["logits"]
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4 if precision == "fp32" else 2e-2 * np.abs(expected).max())
    if gpu_model() is None:
        with pytest.raises(CpcompileError, match="CUDAExecutionProvider"):
            create_session(variant, session_options(variant))


def test_the_bundle_says_what_a_plan_is_for(bundle: Path) -> None:
    opened = open_bundle(bundle)
    opened.verify_all()
    for name in ENGINES:
        info = opened.variant("english", name).plan
        assert info is not None and info.capabilities == ("sm86", "sm89", "sm120") and name.endswith(info.precision)
        assert info.profiles[0].shapes["input_ids"] == ((1, 1), (2, 32), (4, 128))  # trained on sequences of 32
        assert bool(info.rounded) == ("int4" in name)
        assert info.tensors[0] == TensorInfo(
            name="input_ids", is_input=True, dtype="int64", shape=("batch", "sequence")
        )
    component = json.loads((bundle / "english" / "component.json").read_text())
    recorded = component["variants"][ENGINES[0]]["executor_info"]["tensorrt"]
    assert len(recorded["onnx_digest"]) == len(recorded["settings_digest"]) == 64


def test_onnx_runtime_opens_the_package_and_passes_the_plans_over(bundle: Path) -> None:
    package = ort.ModelPackageContext(str(bundle))
    options = ort.ModelPackageOptions(ort.SessionOptions())
    session = package.select_component("english", options).create_session(None)
    inputs = {each.name: each.shape for each in session.get_inputs()}
    (logits,) = session.run(["logits"], complete({"input_ids": np.zeros((1, 4), dtype=np.int64)}, inputs))
    assert logits.shape[:2] == (1, 4)


def test_a_plan_is_no_onnx(bundle: Path, tmp_path: Path) -> None:
    result = run("export", bundle, "english", "--variant", ENGINES[0], "-o", tmp_path / "x.onnx")
    assert result.exit_code == 2
    assert "is a plan of tensorrt-rtx, not an ONNX graph; choose another variant" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_validate_measures_what_can_run(bundle: Path) -> None:
    result = run("validate", bundle, *FAST, "--json")
    assert result.exit_code in (0, 1), result.output
    statuses = {v["name"]: v["status"] for v in json.loads(result.stdout)["contexts"][0]["variants"]}
    assert statuses["cpu-fp32"] == "ran"
    if gpu_model() is None:
        assert {statuses[name] for name in ENGINES} == {"built"}


@pytest.mark.slow
def test_check_never_calls_a_plan_that_did_not_run_a_pass(bundle: Path, tmp_path: Path) -> None:
    if gpu_model() is not None:
        pytest.skip("there is a GPU here")
    arguments = ["check", bundle, "--baseline", tmp_path / "base.json", "--no-speed", "--no-memory"]
    assert run(*arguments, "--update-baseline").exit_code == 0
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    outcomes = json.loads(result.stdout)["outcomes"]
    parity = {each["variant"]: each for each in outcomes if each["name"] == "parity" and each["context"] == "english"}
    assert parity["cpu-fp32"]["verdict"] == "pass"
    for name in ENGINES:
        assert (parity[name]["verdict"], parity[name]["sentence"]) == ("skipped", "built, not run: no NVIDIA GPU")
    plain = json.loads((tmp_path / "base.json").read_text())
    for place in plain["places"]:
        if place["variant"] == ENGINES[0]:
            place["verdicts"] = {"parity": "pass"}  # measured where there was a GPU
    (tmp_path / "base.json").write_text(json.dumps(plain))
    result = run(*arguments)
    assert result.exit_code == 3 and "not measured: built, not run: no NVIDIA GPU" in result.stdout


def test_a_damaged_plan_is_found(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "model.cpc")
    plan = copy / "english" / ENGINES[0] / "engine.plan"
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    result = run("validate", copy, "--model", bundle.with_suffix(".pt"), *FAST)
    assert result.exit_code == 2 and "engine.plan: differs from what was built" in result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", "tpu"], "there is no target 'tpu'"),
        (["--target", "tensorrt-rtx=sm90"], "does not build for sm90"),
        (
            ["--target", "tensorrt-rtx", "--profile", "batch=4:2:1"],
            "batch=4:2:1: write the lengths in ascending order",
        ),
        (["--target", "tensorrt-rtx", "--profile", "tokens=1"], "the dynamic axes are batch, sequence"),
        (["--target", "tensorrt-rtx", "--precision", "fp8"], "--precision 'fp8' does not exist"),
        (["--target", "tensorrt-rtx", "--precision", "int4-weights", "--opset", "20"], "needs opset 21 or later"),
        (["--target", "tensorrt-rtx", "--max-memory", "9GB"], "covers CPU engines only"),
        (["--precision", "fp16"], "--target"),
    ],
)
def test_wrong_settings_are_one_sentence(options: list[str], says: str, model: Path, tmp_path: Path) -> None:
    result = run("build", model, "-o", tmp_path / "x.cpc", *FAST, "--contexts", "english", *options)
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output and not list(tmp_path.iterdir())
