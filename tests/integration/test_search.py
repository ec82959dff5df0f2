"""`cpcompile build --target best`: the fastest engines within the budget, and what the others would have cost.

The models write the held-out text themselves, so that nothing predicts it better than they do: rounding costs. One
matrix has an outlier in every block, which takes the other elements of its block with it when they have 4 bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner, Result

from cpcompile.bundle.reader import open_bundle
from cpcompile.bundle.writer import BundleWriter
from cpcompile.cli import main
from cpcompile.core.cache import OUTPUT
from cpcompile.core.config import BuildConfig, ValidateConfig, preset
from cpcompile.core.errors import UsageError
from cpcompile.core.paths import dense_path
from cpcompile.core.probabilities import log_softmax
from cpcompile.core.rounding import SCHEMES
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.frontend.checkpoint import Checkpoint, save_checkpoint
from cpcompile.frontend.source import Source, open_source
from cpcompile.models.decoder import Decoder
from cpcompile.pipeline.build import freeze_contexts
from cpcompile.pipeline.search import Best, Search, require_search_text
from cpcompile.pipeline.stored_weights import wholes
from cpcompile.pipeline.write_engines import export_engines
from cpcompile.report import SCHEMA
from cpcompile.runtime import load
from cpcompile.targets.requests import parse_targets
from cpcompile.text.tokenization import train_tokenizer
from cpcompile.validation.language_reference import LanguageReference
from cpcompile.validation.open_reference import open_reference
from cpcompile.validation.sensitivity import rounding_costs
from tests.conftest import Once

CONTEXTS = ("a", "b")
DAMAGED = "layers.1.ffn.down.weight"
ONLY_4 = ("int4-weights",)


def write_models(path: Path, *, windows: int = 32) -> None:
    """A model whose contexts keep everything, and as its dense baseline the same."""
    torch.manual_seed(3)
    config = preset("nano")
    selection = Selection(
        CONTEXTS,
        {
            UnitKind.FFN: np.ones((2, config.layers, config.ffn // config.align), dtype=np.bool_),
            UnitKind.HEAD: np.ones((2, config.layers, config.kv_heads), dtype=np.bool_),
        },
    )
    model = Decoder(config, contexts=2)
    model.select(selection)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "gate" not in name:
                parameter.mul_(5)  # fresh weights give every token nearly the same logit
            if name == DAMAGED:
                parameter *= 6
                parameter[:, ::32] *= 10
    dense = Decoder(config)
    dense.load_state_dict({name: each for name, each in model.state_dict().items() if name in dense.state_dict()})
    tokenizer = train_tokenizer([Path(__file__).read_text(encoding="utf-8")], config.vocabulary).to_str()
    held_out = {context: written(dense, 128 * windows + 1, seed) for seed, context in enumerate(CONTEXTS)}
    shared = {"config": config, "tokenizer": tokenizer, "contexts": CONTEXTS, "held_out": held_out}
    save_checkpoint(Checkpoint(state=model.state_dict(), selection=selection, **shared), path)
    save_checkpoint(Checkpoint(state=dense.state_dict(), **shared), dense_path(path))


def written(model: Decoder, tokens: int, seed: int) -> np.ndarray:
    """Text that the model samples, in windows of 128 at a time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocabulary, (tokens // 128 + 1, 1), generator=generator)
    with torch.inference_mode():
        for _ in range(127):
            ids = torch.cat([ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1, generator=generator)], dim=1)
    return ids.flatten()[:tokens].numpy().astype(np.int32)


@pytest.fixture(scope="module")
def model(once: Once) -> Path:
    return once("searched", lambda folder: write_models(folder / "model.pt")) / "model.pt"


@cache
def captured(model: Path) -> tuple[Source, ir.Model]:
    """Capture takes most of a search in so small a model."""
    source = open_source(model)
    return source, source.capture(opset=BuildConfig().opset)


@contextmanager
def searching(model: Path, out: Path, budget: float, **settings: float) -> Iterator[Search]:
    (source, dynamic), config = captured(model), BuildConfig(**settings)
    validation = ValidateConfig(max_perplexity_increase=budget, speed_shapes=((1, 8),))
    reference = open_reference(source, validation, data=None, trimmed={}, progress=quiet)
    assert isinstance(reference, LanguageReference)
    frozen, accounts = freeze_contexts(source, dynamic, CONTEXTS, {}, None, lambda: None)
    parameters = wholes(dynamic, frozen, accounts)
    with BundleWriter(out) as writer:
        metadata = export_engines(writer, dynamic, frozen, parameters, accounts, source, {}, config, lambda: None)
        with Search(
            writer.stage("search"), frozen, parameters, reference, metadata, config, validation, quiet
        ) as search:
            yield search


def quiet(_stage: str, _done: int, _total: int | None) -> None: ...


def found(model: Path, folder: Path, budget: float, precisions: tuple[str, ...], **settings: float) -> Best:
    with searching(model, folder / "out.cpc", budget, **settings) as search:
        best = search.best(precisions)
    assert not list(folder.iterdir()), "candidates are removed"
    assert best.record.candidates[0].name == "fp32" and best.record.candidates[0].relative_time == 1
    assert [each.within_budget for each in best.record.candidates if each.name == best.record.chosen] == [True]
    return best


@pytest.mark.parametrize("scheme", ["int8", "int4-weights"])
def test_the_costs_are_the_divergences_of_rounding_one_parameter(model: Path, scheme: str) -> None:
    source = open_source(model)
    reference = open_reference(source, ValidateConfig(), data=None, trimmed={}, progress=quiet)
    assert isinstance(reference, LanguageReference)
    names = list(source.parameter_sizes())
    names = [name for name, each in source.checkpoint.model.named_parameters() if name in names and each.ndim == 2]
    seen: list[int] = []
    costs = rounding_costs(
        reference, {"a": names, "b": names[1:]}, SCHEMES[scheme], steps=lambda done, _: seen.append(done)
    )
    assert seen == list(range(2 * 8 + 1)) and list(costs) == names
    feeds, divergences = reference.sample("a", 64, 32), {}
    exact = log_softmax(reference.masked("a")(feeds)[OUTPUT])
    for name in names:
        rounded = log_softmax(reference.masked("a", {name: SCHEMES[scheme]})(feeds)[OUTPUT])
        divergences[name] = float((np.exp(exact) * (exact - rounded)).sum(axis=-1).mean())
    ratios = np.array([costs[name] / divergences[name] for name in names])
    assert 0.3 < ratios[0] < 0.7  # the other context does not round it, so that the mean over both is a half
    assert (ratios[1:] > 0.3).all() and (ratios[1:] < 2).all()
    logarithms = np.log([[costs[name], divergences[name]] for name in names[1:]])
    assert np.corrcoef(logarithms.T)[0, 1] > 0.97
    assert all(parameter.requires_grad for parameter in source.checkpoint.model.parameters())


def test_a_precision_over_the_budget_is_mixed_with_more_bits(model: Path, tmp_path: Path) -> None:
    """The budget lies between what 8 bits cost and what 4 bits do, so only a mixture brings 4 bits within it."""
    wide = found(model, tmp_path, 9.0, ("int8-weights", "int4-weights")).record
    by_name = {each.name: each for each in wide.candidates}
    assert list(by_name) == ["fp32", "int8-weights", "int4-weights"] and all(e.within_budget for e in wide.candidates)
    assert by_name["int4-weights"].increase > 20 * abs(by_name["int8-weights"].increase)
    assert by_name["int4-weights"].bits_per_weight < 6 < 9 < by_name["int8-weights"].bits_per_weight < 10
    budget = by_name["int4-weights"].increase / 3
    best = found(model, tmp_path, budget, ("int8-weights", "int4-weights"))
    narrow = {each.name: each for each in best.record.candidates}
    assert list(narrow) == ["fp32", "int8-weights", "int4-weights", "int4-weights+int8-weights"]
    assert not narrow["int4-weights"].within_budget
    mixed = narrow["int4-weights+int8-weights"]
    assert mixed.within_budget and mixed.precision == "mixed" and mixed.increase < budget
    assert set(mixed.rounded) == {"int8-weights", "int4-weights"}
    assert by_name["int4-weights"].bits_per_weight < mixed.bits_per_weight < by_name["int8-weights"].bits_per_weight
    assert best.record.other_increase < 2 * budget


def test_engines_of_openvino_are_candidates_where_they_run(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'cpcompile[openvino]'")
    with searching(model, tmp_path / "out.cpc", 9.0) as search:
        best = search.best((), ("fp32", "bf16"))
    by_name = {each.name: each for each in best.record.candidates}
    assert "openvino-fp32" in by_name and by_name["openvino-fp32"].bits_per_weight == 32
    assert by_name["openvino-fp32"].increase == pytest.approx(by_name["fp32"].increase, abs=1e-5)
    assert "openvino-bf16" in by_name or "openvino-bf16 was not tried: this processor has no" in best.record.reason
    assert best.variant in ("cpu-fp32", *by_name)
    assert parse_targets(["best", "openvino"], ["int8", "fp32"], []).openvino_candidates == ("fp32",)
    assert parse_targets(["best"], ["int8"], []).openvino_candidates == ()


def test_no_mixtures_are_tried_when_the_time_is_over(model: Path, tmp_path: Path) -> None:
    wide = found(model, tmp_path, 9.0, ONLY_4).record.candidates[1]
    record = found(model, tmp_path, wide.increase / 3, ONLY_4, search_seconds=1e-9).record
    assert [each.name for each in record.candidates] == ["fp32", "int4-weights"]
    assert "the time was over before int4-weights+fp32 could be tried" in record.reason


@pytest.mark.slow
def test_nothing_is_chosen_if_float32_itself_is_over_the_budget(model: Path, tmp_path: Path) -> None:
    worse = tmp_path / "worse"
    worse.mkdir()
    for each in (model, dense_path(model)):
        shutil.copy(each, worse / each.name)
    state = torch.load(worse / "model.pt", weights_only=True)
    state["state"][DAMAGED] += 0.3 * state["state"][DAMAGED].std() * torch.randn_like(state["state"][DAMAGED])
    torch.save(state, worse / "model.pt")
    with searching(worse / "model.pt", tmp_path / "out.cpc", 0.0) as search:
        best = search.best(("int8",))
    assert best.variant == "cpu-fp32" and not best.schemes and best.record.chosen == "fp32"
    assert (
        "not even float32 is surely within the budget" in best.record.reason
        and "--max-perplexity-increase" in best.record.reason
    )


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_builds_what_was_chosen_and_says_why(model: Path, tmp_path: Path) -> None:
    target = ("--target", "best", "--precision", "int8", "--max-perplexity-increase", "9")
    result = run("build", model, "-o", tmp_path / "m.cpc", *target, "--no-validate")
    assert result.exit_code == 0, result.output
    assert "verdict: inconclusive" in result.output and "no engine ran: built, not validated: " in result.output
    report = json.loads((tmp_path / "m.cpc" / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    search = report["build"]["search"]
    assert [each["name"] for each in search["candidates"]] == ["fp32", "int8"]
    fastest = min(search["candidates"], key=lambda each: each["relative_time"])
    assert search["chosen"] == fastest["name"] and search["budget"] == 9
    assert f"chosen: {search['chosen']}, " in result.output and "precisions that were tried" in result.output
    assert "<h2>Precisions</h2>" in (tmp_path / "m.cpc" / "report.html").read_text(encoding="utf-8")
    bundle = open_bundle(tmp_path / "m.cpc")
    assert bundle.best == f"cpu-{search['chosen']}"
    for context in CONTEXTS:
        assert load(bundle, context).engine.variant.name == bundle.best


@pytest.mark.slow
def test_a_validation_keeps_the_record_of_the_search(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.cpc"
    target = ("--target", "best", "--precision", "int8", "--max-perplexity-increase", "9")
    assert run("build", model, "-o", path, *target, "--no-validate").exit_code == 0
    search = json.loads((path / "report.json").read_text())["build"]["search"]
    again = run("validate", path, "--model", model, "--rounds", "4", "--max-perplexity-increase", "9")
    assert again.exit_code == 0, again.output
    report = json.loads((path / "report.json").read_text())
    assert report["build"]["search"] == search and report["verdict"] == "pass"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--target", "cpu"), "leave --target cpu out"),
        (("--precision", "fp16"), "--precision 'fp16' does not exist"),
        (("--search-seconds", "0"), "build.search_seconds is 0.0: it has to be positive"),
    ],
)
def test_what_does_not_go_with_a_search(model: Path, tmp_path: Path, flags: tuple[str, ...], says: str) -> None:
    result = run("build", model, "-o", tmp_path / "m.cpc", "--target", "best", *flags)
    assert result.exit_code == 2 and says in result.output, result.output


def test_a_search_needs_a_baseline_and_text(model: Path, tmp_path: Path) -> None:
    alone = shutil.copy(model, tmp_path / "model.pt")
    result = run("build", alone, "--target", "best")
    assert result.exit_code == 2 and "there is no model.dense.pt beside it" in result.output, result.output
    write_models(tmp_path / "short.pt", windows=6)
    reference = open_reference(
        open_source(tmp_path / "short.pt"), ValidateConfig(), data=None, trimmed={}, progress=quiet
    )
    assert isinstance(reference, LanguageReference)
    with pytest.raises(UsageError, match="a has 6 windows of it, and 8 are needed"):
        require_search_text(reference, CONTEXTS)
