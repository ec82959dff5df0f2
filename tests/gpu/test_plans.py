"""Plans of both flavours on a GPU, from the command that builds them to the report that judges them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cpcompile.bundle.reader import Variant, open_bundle
from cpcompile.cli import main
from cpcompile.core.errors import UsageError
from cpcompile.core.measured import NotMeasured
from cpcompile.runtime.engine import load_engine
from cpcompile.runtime.plan import PlanEngine, load_plan
from cpcompile.targets.requests import FLAVOURS, PRECISIONS, RTX_PRECISIONS, TENSORRT_RTX
from cpcompile.targets.tensorrt_library import MODULES
from cpcompile.validation.memory import measure_engine

CONTEXT = "english"
PROFILES = ["--profile", "batch=1:2:4", "--profile", "sequence=1:32:64"]


@pytest.fixture(scope="module", params=FLAVOURS)
def bundle(request: pytest.FixtureRequest, trained: Path, capability: str, tmp_path_factory: Any) -> Path:
    """A bundle with plans for this GPU, in each precision."""
    flavour = request.param
    library = pytest.importorskip(MODULES[flavour], reason=f"{flavour} is not installed; see `cpcompile doctor`")
    if flavour == TENSORRT_RTX and capability.upper() not in library.ComputeCapability.__members__:
        pytest.skip(f"{flavour} does not support this GPU ({capability})")
    model = tmp_path_factory.mktemp(flavour) / "model.pt"
    for name in ("model.pt", "model.dense.pt"):
        shutil.copy(trained.with_name(name), model.with_name(name))
    target = f"{flavour}={capability}" if flavour == TENSORRT_RTX else flavour
    precisions = RTX_PRECISIONS if flavour == TENSORRT_RTX else PRECISIONS
    options = ["--target", target, "--precision", ",".join(precisions), "--contexts", CONTEXT, "--rounds", "5"]
    result = CliRunner().invoke(main, ["build", str(model), *options, *PROFILES])
    assert result.exit_code in (0, 1), result.output  # of quality after 24 steps nothing is certain
    built = model.with_suffix(".cpc")
    return built if built.exists() else built.with_name("model.cpc.failed")


def plans(bundle: Path) -> list[Variant]:
    return [variant for variant in open_bundle(bundle).variants(CONTEXT) if variant.plan]


@pytest.fixture(scope="module")
def engine(bundle: Path) -> PlanEngine:
    """The engine in float32."""
    (plan,) = (plan for plan in plans(bundle) if plan.precision == "fp32")
    return load_plan(plan)


def ids(batch: int, sequence: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    return {"input_ids": np.random.default_rng(seed).integers(0, 500, (batch, sequence), dtype=np.int64)}


def test_every_precision_ran_and_is_the_eager_model(bundle: Path) -> None:
    (context,) = json.loads((bundle / "report.json").read_text())["contexts"]
    judged = {each["precision"]: each for each in context["variants"] if each["runtime"] in FLAVOURS}
    assert set(judged) >= set(PRECISIONS)
    for each in judged.values():
        assert (each["status"], each["parity"]["verdict"]) == ("ran", "pass"), (each["name"], each["parity"])
        assert all(shape["p50_ms"] > 0 for shape in each["speed"]["shapes"])
        assert each["memory"]["vram_bytes"] or each["memory"]["not_measured"]["vram_bytes"]


def test_shapes_repeat_change_and_come_back(bundle: Path, engine: PlanEngine) -> None:
    """Plain, recorded, replayed: other values in the same buffers, and other shapes between them."""
    reference = load_engine(open_bundle(bundle), CONTEXT, threads=1)
    cases = [(2, 32, 1), (2, 32, 2), (2, 32, 3), (1, 1, 4), (4, 64, 5), (4, 64, 6), (2, 32, 7), (2, 32, 8)]
    for batch, sequence, seed in cases:
        feeds = ids(batch, sequence, seed)
        expected = reference.outputs(feeds)["logits"]
        np.testing.assert_allclose(engine.outputs(feeds)["logits"], expected, rtol=1e-3, atol=1e-3)


def test_shapes_and_types_that_it_does_not_take_are_refused(engine: PlanEngine) -> None:
    with pytest.raises(UsageError, match=r"input_ids is \(5, 1\); the engine takes \(1, 1\) to \(4, 64\)"):
        engine.outputs(ids(5, 1))
    with pytest.raises(UsageError, match="int32; torch.int64 is needed"):
        engine.outputs({"input_ids": np.zeros((1, 1), dtype=np.int32)})
    with pytest.raises(UsageError, match="its inputs are input_ids; none were given"):
        engine.outputs({})
    assert engine.outputs(ids(1, 1))["logits"].shape[:2] == (1, 1)  # and it still runs


def test_latency_is_that_of_the_gpu(engine: PlanEngine) -> None:
    times = engine.milliseconds(ids(1, 32), runs=20)
    assert len(times) == 20 and min(times) > 0


def test_video_memory_is_told_or_the_reason_why_not(bundle: Path) -> None:
    plan = plans(bundle)[0]
    memory = measure_engine(bundle, CONTEXT, plan.name, ids(1, 32), threads=1)
    assert not isinstance(memory, NotMeasured), memory
    assert isinstance(memory.vram_bytes, NotMeasured) or memory.vram_bytes >= plan.bytes // 2
