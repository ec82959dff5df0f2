"""`cpcompile calibrate`, and builds, validations and checks of what it has chosen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cpcompile.bundle.reader import open_bundle
from cpcompile.cli import main
from cpcompile.core.paths import calibration_path, dense_path
from cpcompile.files.whole_files import file_digest
from cpcompile.frontend.source import open_source
from cpcompile.runtime.engine import load_engine

FAST = ("--no-speed", "--no-memory", "--no-layers", "--max-perplexity-increase", "9")
ONE = ("--contexts", "english", "--vocabulary-coverage", "0.9")
FEW = ("--target", "cpu", "--precision", "int8,int4-weights")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(trained: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model, which tests leave as it is."""
    model = tmp_path_factory.mktemp("calibrated") / "model.pt"
    for path, copy in ((trained, model), (dense_path(trained), dense_path(model))):
        shutil.copy(path, copy)
    result = run("calibrate", model, "--data", corpus_folder, "--tokens", 2048)
    assert result.exit_code == 0, result.output
    assert f"wrote {calibration_path(model)}" in " ".join(result.output.split())
    return model


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    result = run("build", model, *FAST, *FEW, *ONE)
    assert result.exit_code == 0, result.output
    assert f"weights are rounded as {calibration_path(model)} says" in result.output
    return model.with_suffix(".cpc")


def copied(model: Path, folder: Path) -> Path:
    shutil.copytree(model.parent, folder / "copy")
    return folder / "copy" / model.name


def test_engines_have_the_chosen_numbers_and_are_those_of_the_eager_model(bundle: Path) -> None:
    """With a trimmed vocabulary, whose rows are in another order than in the model."""
    report = json.loads((bundle / "report.json").read_text())
    for context in report["contexts"]:
        assert [each["parity"]["verdict"] for each in context["variants"]] == ["pass", "pass", "pass"]


def test_engines_differ_from_those_rounded_to_the_nearest(bundle: Path, model: Path, tmp_path: Path) -> None:
    copy = copied(model, tmp_path)
    calibration_path(copy).unlink()
    out = tmp_path / "nearest.cpc"
    result = run("build", copy, *FEW, *ONE, "--no-validate", "-o", out)
    assert result.exit_code == 0 and "`cpcompile calibrate` finds better ones" in result.output, result.output
    ids = np.random.default_rng(0).integers(0, 100, (1, 12))
    for variant in ("cpu-int4-weights", "cpu-int8"):
        outputs = [load_engine(open_bundle(each), "english", variant).run(ids) for each in (bundle, out)]
        assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    assert run("validate", out, "--model", model, *FAST).exit_code == 0  # whose calibration came later


def test_a_bundle_needs_its_calibration(bundle: Path, model: Path, tmp_path: Path) -> None:
    copy = copied(model, tmp_path)
    calibration_path(copy).unlink()
    commands = (
        ("validate", bundle, "--model", copy, *FAST),
        ("check", bundle, "--model", copy, "--baseline", tmp_path / "base.json", "--update-baseline"),
    )
    for command in commands:
        result = run(*command)
        assert result.exit_code == 2 and "there is no model.calibration.pt" in result.output, result.output
    calibration_path(copy).write_bytes(b"another")
    for command in commands:
        result = run(*command)
        assert result.exit_code == 2 and "the model.calibration.pt is not the one" in result.output, result.output


def test_bundles_in_float32_do_not_depend_on_it(model: Path, tmp_path: Path) -> None:
    copy = copied(model, tmp_path)
    arguments = ("build", copy, *FAST, *ONE, "--no-validate", "-o", tmp_path / "exact.cpc")
    assert "rounded" not in run(*arguments).output
    calibration_path(copy).write_bytes(b"another")
    assert "up to date" in run(*arguments).output


def test_a_new_calibration_builds_again(model: Path, corpus_folder: Path, tmp_path: Path) -> None:
    copy = copied(model, tmp_path)
    shutil.rmtree(copy.with_suffix(".cpc"), ignore_errors=True)
    arguments = ("build", copy, *FAST, *FEW, "--contexts", "english", "--no-validate")
    assert "up to date" not in run(*arguments).output
    assert "up to date" in run(*arguments).output
    few = ("--tokens", 256, "--precision", "int4-weights")
    assert run("calibrate", copy, "--data", corpus_folder, *few).exit_code == 0
    result = run(*arguments)
    assert result.exit_code == 2 and "was made without int8; calibrate again" in result.output, result.output
    less = run("build", copy, *FAST, "--target", "cpu", "--precision", "int4-weights", *ONE, "--no-validate")
    assert less.exit_code == 0 and "up to date" not in less.output


def test_what_cannot_be_calibrated_is_refused(model: Path, corpus_folder: Path, tmp_path: Path) -> None:
    assert open_source(model).calibration
    program = tmp_path / "program.pt2"
    program.write_bytes(b"PK")
    for arguments, says in (
        ((model, "--data", corpus_folder, "--tokens", "3"), "--tokens is 3; a sequence of"),
        ((model, "--data", corpus_folder, "--tokens", "0"), "0 is not in the range x>=1"),
        ((model, "--data", corpus_folder, "--precision", "int9"), "int9: is not among int8, int7"),
        ((model, "--data", corpus_folder, "--precision", ","), "names nothing"),
        ((model, "--data", tmp_path / "nowhere"), "nowhere"),
        ((dense_path(model), "--data", corpus_folder), "is a dense checkpoint"),
        ((tmp_path / "none.pt", "--data", corpus_folder), "there is no such file"),
        ((program, "--data", corpus_folder), "program.pt2"),
    ):
        result = run("calibrate", *arguments)
        assert result.exit_code == 2 and says in result.output, result.output


def test_inspect_names_the_calibration_of_rounded_weights(bundle: Path, model: Path) -> None:
    digest = file_digest(calibration_path(model))
    assert f"calibration  sha256 {digest[:12]}" in run("inspect", bundle).output
    assert json.loads(run("inspect", bundle, "--json").output)["calibration"] == digest
