"""A build that finds its bundle finished, or engines that have not changed: what it keeps, and what it makes again."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from cpcompile.cli import main
from cpcompile.core.config import BuildConfig, ValidateConfig
from cpcompile.core.paths import dense_path
from cpcompile.core.selection import UnitKind
from cpcompile.frontend.checkpoint import load_checkpoint, save_checkpoint
from cpcompile.pipeline.up_to_date import finished_report
from cpcompile.report import read_report
from tests.conftest import Once

OPTIONS = ["--no-speed", "--no-memory", "--no-layers", "--contexts", "cpp,python", "--max-perplexity-increase", "9"]
CONFIG = BuildConfig(contexts=("cpp", "python"))
VALIDATION = ValidateConfig(speed=False, memory=False, layers=False, max_perplexity_increase=9.0)
UP_TO_DATE = "is up to date: nothing that it depends on has changed"


def build(model: Path, *arguments: object) -> Result:
    result = CliRunner().invoke(main, ["build", str(model), *OPTIONS, *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def kept(bundle: Path) -> dict[str, bool]:
    report = read_report(bundle)
    return {f"{c.name} {each.name}": each.kept for c in report.contexts for each in c.variants}


@pytest.fixture
def model(trained: Path, once: Once, tmp_path: Path) -> Path:
    """A model with its bundle, which a test may change."""

    def make(folder: Path) -> None:
        for path in (trained, dense_path(trained)):
            shutil.copy(path, folder)
        build(folder / trained.name)

    return Path(shutil.copytree(once("up-to-date", make), tmp_path / "built")) / trained.name


@pytest.fixture
def bundle(model: Path) -> Path:
    return model.with_suffix(".cpc")


def test_a_finished_bundle_stays(model: Path, bundle: Path) -> None:
    before = (bundle / "manifest.json").stat().st_ino
    again = build(model, "--json")
    assert UP_TO_DATE in again.stderr
    assert json.loads(again.stdout) == json.loads((bundle / "report.json").read_text())
    assert (bundle / "manifest.json").stat().st_ino == before
    assert UP_TO_DATE in build(model, "--no-validate").stderr  # it has more than was asked for
    assert UP_TO_DATE not in build(model, "--rebuild").stderr
    assert not any(kept(bundle).values())


def test_saying_so_takes_none_of_the_libraries_of_a_build(model: Path) -> None:
    code = (
        "import sys\nfrom cpcompile.cli import main\n"
        f"try: main({['build', str(model), *OPTIONS]!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'onnx_ir', 'onnxruntime'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and UP_TO_DATE in done.stderr, done.stderr


def finished(model: Path, config: BuildConfig = CONFIG, validation: ValidateConfig = VALIDATION) -> bool:
    return finished_report(model, model.with_suffix(".cpc"), config, validation, None) is not None


def test_it_is_not_finished_if_anything_else_was_asked_for(model: Path, corpus_folder: Path) -> None:
    assert finished(model)
    assert finished(model, validation=replace(VALIDATION, jobs=2))
    assert not finished(model, BuildConfig(contexts=("cpp",)))
    assert not finished(model, BuildConfig(contexts=CONFIG.contexts, targets=("cpu",)))
    assert not finished(model, validation=ValidateConfig(speed=False, memory=False, layers=False))
    assert finished_report(model, model.with_suffix(".cpc"), CONFIG, VALIDATION, corpus_folder) is None
    dense_path(model).unlink()
    assert not finished(model)


def test_a_bundle_that_is_damaged_or_failed_is_not_finished(model: Path, bundle: Path) -> None:
    report = bundle / "report.json"
    text = report.read_text()
    for damaged in (json.dumps(json.loads(text) | {"verdict": "inconclusive"}), text[:-50]):
        report.write_text(damaged)
        assert not finished(model)
    report.write_text(text)
    weights = next((bundle / "shared_assets").rglob("weights.bin"))
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    assert not finished(model)


def test_engines_that_another_build_has_too_keep_their_results(model: Path, bundle: Path) -> None:
    before = read_report(bundle).contexts
    shown = build(model, "--target", "cpu")
    assert "the results of 2 of 4 engines, which have not changed, are kept" in shown.stdout
    names = ("cpu-fp32", "cpu-int8")
    assert kept(bundle) == {f"{c.name} {name}": name == "cpu-fp32" for c in before for name in names}
    assert "the results of 2 engines, which have not changed" in (bundle / "report.html").read_text()
    for old, new in zip(before, read_report(bundle).contexts, strict=True):
        assert (old.variants[0].parity, old.variants[0].quality) == (new.variants[0].parity, new.variants[0].quality)
        assert new.variants[1].parity.verdict == "pass"


@pytest.mark.slow
def test_what_was_not_validated_is_validated(model: Path, bundle: Path) -> None:
    shutil.rmtree(bundle)
    build(model, "--no-validate")
    assert UP_TO_DATE in build(model, "--no-validate").stderr
    assert UP_TO_DATE not in build(model).stderr
    assert read_report(bundle).verdict == "pass" and not any(kept(bundle).values())


def test_only_a_context_that_changed_is_validated_again(model: Path, bundle: Path) -> None:
    checkpoint = load_checkpoint(model)
    assert checkpoint.selection is not None
    units = {name: checkpoint.selection.row(name)[UnitKind.FFN] for name in checkpoint.contexts}
    own = units["cpp"] & ~np.logical_or.reduce([units[name] for name in units if name != "cpp"])
    layer, unit = np.argwhere(own)[0]
    align = checkpoint.config.align
    with torch.no_grad():
        checkpoint.state[f"layers.{layer}.ffn.down.weight"][:, unit * align : (unit + 1) * align] *= 1.01
    save_checkpoint(checkpoint, model)
    build(model)
    assert kept(bundle) == {"cpp cpu-fp32": False, "python cpu-fp32": True}


@pytest.mark.slow
def test_given_text_is_read_each_time(model: Path, bundle: Path, corpus_folder: Path) -> None:
    build(model, "--data", corpus_folder)
    first = read_report(bundle)
    assert UP_TO_DATE not in build(model, "--data", corpus_folder).stderr
    assert all(kept(bundle).values()) and read_report(bundle).conditions == first.conditions
    assert not finished(model)
