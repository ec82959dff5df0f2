"""ONNX Runtime on a GPU: the engines of the CPU on each provider that is installed."""

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from cpcompile.bundle.reader import open_bundle
from cpcompile.cli import main
from cpcompile.core.measured import NotMeasured
from cpcompile.doctor.examination import GPU_PROVIDERS, examine
from cpcompile.runtime.engine import Engine, create_session, load_engine, plugin_devices, session_options

OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}


@pytest.fixture(scope="module")
def bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("providers") / "model.cpc"
    options = ["-o", str(out), "--contexts", "english", "--no-speed", "--no-memory"]
    result = CliRunner().invoke(main, ["build", str(trained), *options])
    assert result.exit_code in (0, 1), result.output
    return out if out.exists() else out.with_name("model.cpc.failed")


@pytest.mark.parametrize("provider", GPU_PROVIDERS)
def test_an_engine_runs_on_the_provider_that_it_asks_for(bundle: Path, provider: str) -> None:
    if provider not in ort.get_available_providers() and isinstance(plugin_devices(provider), NotMeasured):
        pytest.skip(f"{provider} is not installed; see `cpcompile doctor`")
    opened = open_bundle(bundle)
    variant = opened.variant("english", "cpu-fp32")
    moved = dataclasses.replace(variant, provider=provider, provider_options=OPTIONS.get(provider, {}))
    engine = Engine(moved, create_session(moved, session_options(moved)))
    feeds = {"input_ids": np.random.default_rng(0).integers(0, 500, (2, 16), dtype=np.int64)}
    expected = load_engine(opened, "english", threads=1).outputs(feeds)["logits"]
    np.testing.assert_allclose(engine.outputs(feeds)["logits"], expected, rtol=2e-3, atol=2e-3)


def test_the_doctor_sees_the_gpu() -> None:
    found = examine()
    assert found.gpus and found.gpus[0]["memory_bytes"] > 0 and "." in found.gpus[0]["compute_capability"]
