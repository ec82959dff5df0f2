"""`cpcompile build --target cpu`: engines whose weights are rounded, beside those in float32."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import jsonschema
import numpy as np
import onnxruntime_genai as og
import pytest
from click.testing import CliRunner, Result

from cpcompile.bundle.reader import open_bundle
from cpcompile.cli import main
from cpcompile.core.config import ModelConfig
from cpcompile.core.rounding import SCHEMES
from cpcompile.core.selection import UnitKind
from cpcompile.exporters.weights_file import ALIGNMENT
from cpcompile.files.external_data import references_of
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.report import SCHEMA
from cpcompile.runtime import load, load_all
from cpcompile.runtime.engine import load_engine
from tests.unit.exporters.genai import generate

PRECISIONS = ("int8", "int4-weights")
VARIANTS = tuple(f"cpu-{each}" for each in PRECISIONS)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its quality after 24 steps is no matter: the verdict may be fail."""
    folder = tmp_path_factory.mktemp("quantized")
    for name in ("model.pt", "model.dense.pt"):
        shutil.copy(trained.with_name(name), folder / name)
    fast = (
        "--no-speed",
        "--no-memory",
        "--no-layers",
        "--max-perplexity-increase",
        "9",
        "--contexts",
        "english,python",
    )
    result = run("build", folder / "model.pt", *fast, "--target", "cpu", "--precision", ",".join(PRECISIONS))
    assert result.exit_code == 0, result.output
    return folder / "model.cpc"


def test_each_is_the_eager_model_with_its_weights_and_says_what_that_costs(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    for context in report["contexts"]:
        variants = {each["name"]: each for each in context["variants"]}
        assert list(variants) == ["cpu-fp32", *VARIANTS]
        exact = variants.pop("cpu-fp32")
        assert "rounded" not in exact["parity"]["tolerance_source"]
        for each in variants.values():
            assert each["status"] == "ran" and each["parity"]["verdict"] == "pass", each["parity"]
            assert "both with the engine's rounded weights" in each["parity"]["tolerance_source"]
            assert each["quality"]["perplexity"] == pytest.approx(exact["quality"]["perplexity"], rel=0.02)
            assert each["quality"]["perplexity"] != exact["quality"]["perplexity"]
            assert each["bytes"] < 0.6 * exact["bytes"]


def test_what_contexts_share_is_stored_once(bundle: Path) -> None:
    opened = open_bundle(bundle)
    for name in VARIANTS:
        variants = [opened.variant(context, name) for context in opened.contexts]
        (folder,) = {variant.weights for variant in variants}
        graphs = [variant.model.stat().st_size for variant in variants]
        own = sum(variant.bytes for variant in variants) - sum(graphs)
        assert (folder / "weights.bin").stat().st_size < 0.8 * own


@pytest.mark.parametrize("precision", PRECISIONS)
def test_blocks_that_both_contexts_keep_lie_in_one_place(bundle: Path, precision: str) -> None:
    opened, checkpoint = open_bundle(bundle), load_checkpoint(bundle.with_suffix(".pt"))
    variants = [opened.variant(context, f"cpu-{precision}") for context in ("english", "python")]
    (weights,) = {variant.weights for variant in variants}
    assert weights is not None
    english, python = ({each.name: each for each in references_of(variant.model)} for variant in variants)
    shared = {name: reference for name, reference in english.items() if name in python}
    assert shared == {name: python[name] for name in shared}  # location, offset, length, shape and type

    ranges = sorted({(each.offset, each.length or 0) for each in (*english.values(), *python.values())})
    assert len(ranges) == len(english.keys() | python.keys())
    assert all(0 <= offset - sum(before) < ALIGNMENT for before, (offset, _) in pairwise([(0, 0), *ranges]))
    assert (weights / "weights.bin").stat().st_size == sum(ranges[-1])

    assert checkpoint.selection is not None and isinstance(checkpoint.config, ModelConfig)
    kept = [checkpoint.selection.row(context)[UnitKind.FFN] for context in ("english", "python")]
    block = checkpoint.config.align * checkpoint.config.width * SCHEMES[precision].bits // 8
    for layer, both in enumerate((kept[0] & kept[1]).sum(axis=1)):
        for part in ("gate", "up"):
            name = f"layers.{layer}.ffn.{part}.weight.int"
            assert sum(each.length or 0 for own, each in shared.items() if own.startswith(name)) == both * block
    assert (kept[0] & kept[1]).any() and (kept[0] != kept[1]).any()


def test_best_is_the_one_in_float32(bundle: Path) -> None:
    assert load(bundle, "english").engine.variant.name == "cpu-fp32"


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_runtimes_agree(bundle: Path, variant: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 400, (1, 12))
    engine = load_engine(bundle, "english", variant)
    with load_all(bundle, variant, threads=1) as engines:
        np.testing.assert_allclose(engines["english"].engine.run(ids), engine.run(ids), atol=1e-5)
        expected = engines["english"].generate(ids[0].tolist(), max_new_tokens=8)
    result = run("run", bundle, "--context", "english", "--variant", variant, "--max-new-tokens", "3", "def")
    assert result.exit_code == 0, result.output
    out = tmp_path / "genai"
    result = run("export", bundle, "english", "--variant", variant, "--format", "genai", "-o", out)
    assert result.exit_code == 0, result.output
    assert generate(og.Model(str(out)), ids.tolist(), len(expected)) == [list(expected)]
    result = run("export", bundle, "english", "--variant", variant, "-o", tmp_path / "english.onnx")
    assert result.exit_code == 0, result.output
    warned = "run it with the session option session.x64quantprecision=1, or its results differ" in result.output
    assert warned == (variant == "cpu-int8")


def test_what_does_not_fit_is_refused_before_the_work_begins(bundle: Path) -> None:
    model = bundle.with_suffix(".pt")
    for arguments, says in (
        (("--target", "cpu", "--precision", "fp16"), "there are int8, int7, int8-weights, int4-weights"),
        (("--target", "cpu", "--target", "cuda", "--precision", "int8"), "--target cuda: has none of the precisions"),
        (("--target", "cpu=sm86"), "--target cpu builds for every processor"),
        (("--target", "cpu", "--profile", "batch=1"), "engines for the CPU take every length"),
        (
            ("--target", "cpu", "--precision", "int4-weights", "--standard-operators"),
            "--precision int4-weights needs operators of ONNX Runtime",
        ),
    ):
        result = run("build", model, *arguments)
        assert result.exit_code == 2 and says in " ".join(result.output.split()), result.output
