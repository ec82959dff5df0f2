"""`cpcompile estimate`, and `--max-memory` of `build` and `validate`, beside real builds."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from cpcompile.cli import main
from cpcompile.core.config import BuildConfig, ValidateConfig
from cpcompile.pipeline.build import build_bundle
from cpcompile.pipeline.estimation import Libraries, estimate, read_facts

FAST = ["--no-speed", "--no-memory"]
LIBRARIES = Libraries(build=1, validation=1, engine=1, eager=1)
"""Placeholder: the memory of the libraries is not part of this comparison."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """In a folder with nothing but its dense baseline."""
    for name in ("model.pt", "model.dense.pt"):
        shutil.copy(trained.with_name(name), tmp_path / name)
    return tmp_path / "model.pt"


def files(model: Path) -> set[str]:
    return {path.name for path in model.parent.iterdir()}


def test_the_table(model: Path) -> None:
    result = run("estimate", model, "--batch", 2, "--sequence", 64)
    assert result.exit_code == 0, result.output
    for word in ("capture, freeze, export", "validate: memory", "english", "eager model", "bundle: ", "2×64 tokens"):
        assert word in result.stdout
    assert files(model) == {"model.pt", "model.dense.pt"}


@pytest.mark.parametrize(
    "settings", [{"vocabulary_coverage": 0.9}, pytest.param({"merged": True}, marks=pytest.mark.slow)]
)
def test_the_figures_are_those_of_a_build(model: Path, settings: dict[str, Any]) -> None:
    validation = ValidateConfig(speed=False, memory=False, coherence=False)
    config = BuildConfig(contexts=("cpp", "python"), **settings)
    facts = read_facts(model, contexts=config.contexts, coverage=config.vocabulary_coverage)
    predicted = estimate(facts, LIBRARIES, config, validation)
    report, _ = build_bundle(
        model, model.with_name("model.cpc"), config, validation, progress=lambda _stage, _done, _total: None
    )
    names = [context.name for context in report.contexts]
    assert names == list(predicted.engines) == ["cpp", "python"]
    for context in report.contexts:
        assert 4 * context.parameters.kept == facts.contexts[context.name].kept_bytes
    assert facts.dense_bytes == report.bundle.dense_bytes
    assert predicted.bundle_bytes == pytest.approx(report.bundle.bytes, rel=0.15)


@pytest.mark.slow
def test_a_limit_stops_a_build_before_it_writes(model: Path) -> None:
    result = run("build", model, "--max-memory", "1MB")
    assert result.exit_code == 2
    error = result.stderr.strip()
    assert error.startswith("estimate …\nError: --max-memory allows 1.0 MB, about ") and error.count("\n") == 1
    assert "MB are needed at the peak (validate: memory); contexts are built one after the other" in error
    assert result.stdout == "" and files(model) == {"model.pt", "model.dense.pt"}


@pytest.mark.slow
def test_what_fits_is_built_and_validation_has_the_same_limit(model: Path) -> None:
    built = run("build", model, "--max-memory", "100GB", "--contexts", "cpp", *FAST)
    assert built.exit_code in (0, 1, 3), built.output
    bundle = next(model.parent.glob("model.cpc*"))
    before = (bundle / "report.json").read_bytes()
    refused = run("validate", bundle, "--model", model, "--max-memory", "1MB")
    assert refused.exit_code == 2 and "--max-memory allows 1.0 MB" in refused.stderr
    assert (bundle / "report.json").read_bytes() == before


@pytest.mark.parametrize("size", ["0", "-1GB", "much", "9" * 400 + "GB"])
def test_what_is_no_size_is_refused(model: Path, size: str) -> None:
    for command in ("build", "validate"):
        target = model if command == "build" else model.with_name("missing.cpc")
        result = run(command, target, "--max-memory", size)
        assert result.exit_code == 2 and "is not a memory size" in result.stderr, result.output
    assert files(model) == {"model.pt", "model.dense.pt"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--contexts", "german"], "has no context 'german'; it has cpp, english, python"),
        (["--contexts", ","], "names nothing"),
        (["--merged", "--standalone"], "leave out --standalone"),
        (["--merged", "--contexts", "cpp"], "there is only cpp"),
        (["--merged", "--vocabulary-coverage", "1"], "leave out --vocabulary-coverage"),
        (["--vocabulary-coverage", "2"], "coverage"),
        (["--vocabulary-coverage", "nan"], "coverage"),
        (["--batch", "0"], "is not in the range"),
        (["--sequence", "9" * 400], "is not in the range"),
    ],
)
def test_plans_of_which_nothing_can_be_built(model: Path, flags: list[str], says: str) -> None:
    result = run("estimate", model, *flags)
    assert result.exit_code == 2 and says in result.stderr, result.output


def test_a_larger_claim_is_one_sentence(model: Path) -> None:
    plain = torch.load(model, weights_only=True)
    plain["architecture"]["config"]["vocabulary"] = 10**9
    torch.save(plain, model)
    for command in (["estimate"], ["build"], ["build", "--max-memory", "1GB"]):
        result = run(*command, model)
        assert result.exit_code == 2 and "inconsistent" in result.stderr, result.output
        assert result.stderr.startswith(f"Error: {model}: ") and result.stderr.count("\n") == 1
    assert run("estimate", model.with_name("none.pt")).stderr.endswith("`cpcompile train` writes one\n")
