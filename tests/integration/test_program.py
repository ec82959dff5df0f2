"""`cpcompile build model.pt2` and `validate` on a module written by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch.export import Dim

import cpcompile
from cpcompile.bundle.reader import open_bundle
from cpcompile.cli import main
from cpcompile.core.config import ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.frontend.program import load_program
from cpcompile.report import SCHEMA
from cpcompile.runtime.engine import load_engine
from cpcompile.validation.program_reference import ProgramReference
from cpcompile.validation.validator import validate
from tests.unit.partitioning.models import GatedConvolution, randomise


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = GatedConvolution()
    randomise(net, 1)
    generator = torch.Generator().manual_seed(0)
    batches = {
        "day": [(torch.randn(2, 6, 16, generator=generator),), (torch.randn(1, 9, 16, generator=generator),)],
        "night": [(torch.randn(2, 6, 16, generator=generator) + 1,)],
    }
    shapes = ({0: Dim("batch", min=1), 1: Dim("sequence", max=64)},)
    module = cpcompile.partition(net, batches["day"][0], contexts=2, dynamic_shapes=shapes, align=4)
    selection = cpcompile.select_units(
        module, batches, lambda output, _: output.square().flatten(1).mean(1).sum(), {"ffn": 0.5, "head": 0.5}
    )
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    cpcompile.save_program(module, selection, path, examples=batches)
    return path


@pytest.fixture(scope="module")
def report(model: Path) -> dict[str, Any]:
    result = run("build", model, "--merged", "--rounds", 3)
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(model.with_name("net.cpc").joinpath("report.json").read_text())
    return content


def test_engines_are_the_masked_program(model: Path, report: dict[str, Any]) -> None:
    program, bundle = load_program(model), open_bundle(model.with_name("net.cpc"))
    feeds = {"x": np.random.default_rng(3).normal(size=(3, 17, 16)).astype(np.float32)}
    for context in ("day", "night"):
        (expected,) = program.eager(context)(feeds).values()
        for variant in ("cpu-fp32", "cpu-fp32-merged"):
            (output,) = load_engine(bundle, context, variant).outputs(feeds).values()
            assert np.abs(output - expected).max() <= 1e-5 * np.abs(expected).max()
    day, night = (bundle.metadata["parameters"][context] for context in ("day", "night"))
    assert day["kept"] == sum(program.kept["day"].values()) < day["total"]
    assert set(night["removed_by_kind"]) == {"ffn", "head"}
    with pytest.raises(UsageError, match="has no tokenizer of 'day'; it was built from a program"):
        bundle.tokenizer("day")


def test_the_report_says_what_a_program_has_and_what_not(report: dict[str, Any]) -> None:
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert report["verdict"] == "pass" and report["reasons"] == []
    assert report["model"]["architecture"] == "program" and report["training"] is None
    assert set(report["selection"]["kinds"]) == {"ffn", "head"}
    for layer in report["selection"]["kinds"]["ffn"]:
        assert {kept.count("1") / len(kept) for kept in layer["kept"].values()} == {0.5}, layer["name"]
    for context in report["contexts"]:
        for variant in context["variants"]:
            assert variant["parity"]["verdict"] == "pass"
            assert variant["parity"]["not_measured"]["mean_kl"] == "the model gives no logits"
            assert "for its own task to say" in variant["quality"]["not_measured"]["perplexity"]
            assert variant["memory"]["run_peak_rss_bytes"] < variant["memory"]["eager_run_peak_rss_bytes"]
            (shape,) = variant["speed"]["shapes"]
            assert shape["sequence"] is None and shape["ratio"] > 0


def test_its_page_says_so_too(model: Path, report: dict[str, Any]) -> None:
    page = model.with_name("net.cpc").joinpath("report.html").read_text(encoding="utf-8")
    assert ">Pass</strong>" in page and "for its own task to say" in page
    assert "the model records no training results" in page


class _Fresh(torch.nn.Module):
    """As new: biases are zero, few rows of the table of positions are read, and a part is in float32 come what may."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.nn.Embedding(12, 16)
        self.wide, self.narrow = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        for layer in (self.wide, self.narrow):
            torch.nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.positions(torch.arange(5))
        with torch.autocast("cpu", enabled=False):
            x = x.to(torch.float32) * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return self.narrow(torch.relu(self.wide(x)))


@pytest.mark.slow
def test_a_new_module_adds_up(tmp_path: Path) -> None:
    torch.manual_seed(4)
    net, batches = _Fresh(), {"day": [(torch.randn(2, 5, 16),)], "night": [(torch.randn(2, 5, 16),)]}
    module = cpcompile.partition(net, batches["day"][0], contexts=2, align=4)
    selection = cpcompile.select_units(module, batches, lambda output, _: output.square().sum(), {"ffn": 0.5})
    cpcompile.save_program(module, selection, tmp_path / "new.pt2", examples=batches)
    result = run("build", tmp_path / "new.pt2", "--no-speed", "--no-memory", "--json")
    assert result.exit_code == 0, result.output
    for context in json.loads(result.stdout)["contexts"]:
        assert context["parameters"]["removed_by_kind"] == {"ffn": 16 * (16 + 1 + 16), "other": 7 * 16}


@pytest.mark.slow
def test_it_is_validated_again(model: Path, report: dict[str, Any]) -> None:
    result = run("validate", model.with_name("net.cpc"), "--no-speed", "--no-memory")
    assert result.exit_code == 0, result.output


def test_engines_of_the_wrong_context_fail(model: Path, report: dict[str, Any]) -> None:
    program, bundle = load_program(model), open_bundle(model.with_name("net.cpc"))
    swapped = dataclasses.replace(program, contexts=("night", "day"))
    config = ValidateConfig(memory=False, speed=False, rounds=3)
    results = validate(bundle, ProgramReference(model, swapped), config)
    for result in (each for own in results.values() for each in own):
        assert result.parity.verdict == "fail" and "exceeds the tolerance" in result.parity.reason


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocabulary-coverage", "1"], "brings no tokenizer; leave --vocabulary-coverage out"),
        (["--data", "."], "compared on the examples that it brings; leave --data"),
        (["--contexts", "dusk"], "has no context 'dusk'; it has day, night"),
        (["--contexts", "day", "--merged"], "there is only day"),
        (["--target", "tensorrt-rtx", "--precision", "int4-weights"], "round the weights of language models"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: list[str], message: str, model: Path, tmp_path: Path) -> None:
    result = run("build", model, "-o", tmp_path / "out.cpc", *flags)
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert list(tmp_path.iterdir()) == []
