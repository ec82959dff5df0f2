"""A run does what its settings need and no more, says how far it is, and never makes too many logits at once."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cpcompile.core.config import ModelConfig, TrainConfig, preset
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.frontend.checkpoint import Checkpoint
from cpcompile.models import language_model
from cpcompile.models.decoder import Decoder
from cpcompile.text.corpus import Corpus
from cpcompile.training.branch import StepReport
from cpcompile.training.importance import measure_importance
from cpcompile.training.trainer import swap_matrix, train, work_path

SHORT = TrainConfig(steps=2, sequence=16, batch=2, importance_sequences=4, held_out_tokens=64, recalibrations=1)


class Seen:
    """The stages of a run: for each the last report, and whether the branches had a teacher."""

    def __init__(self, out: Path) -> None:
        self.stages: dict[str, tuple[int, int | None]] = {}
        self.taught = False
        self._teacher = work_path(out) / "teacher"

    def progress(self, name: str, done: int, total: int | None) -> None:
        self.stages[name] = (done, total)

    def observe(self, _report: StepReport) -> None:
        self.taught |= self._teacher.exists()


def run(corpus: Corpus, model: ModelConfig, out: Path, **settings: object) -> tuple[Checkpoint, Seen]:
    seen = Seen(out)
    config = dataclasses.replace(SHORT, **settings)  # type: ignore[arg-type]
    return train(corpus, model, config, out, progress=seen.progress, observer=seen.observe), seen


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({}, {"importance", "evaluate swapped units"}),
        ({"budgets": {"ffn": 1.0, "head": 0.5}}, {"importance", "evaluate swapped units"}),
        ({"specificity": -1.0}, {"importance"}),
        ({"budgets": {"ffn": 1.0, "head": 1.0}}, set()),
        ({"budgets": {"ffn": 0.99, "head": 1.0}}, set()),  # of 32 blocks all are left
    ],
)
def test_only_what_the_budgets_need_is_measured(
    settings: dict[str, object], stages: set[str], corpus: Corpus, model_config: ModelConfig, tmp_path: Path
) -> None:
    checkpoint, seen = run(corpus, model_config, tmp_path / "model.pt", **settings)
    assert seen.stages.keys() - stages == {"evaluate dense-baseline", "evaluate partition"}
    assert stages <= seen.stages.keys()
    assert (checkpoint.training["swap_matrix"] is None) == ("evaluate swapped units" not in stages)
    assert checkpoint.selection is not None
    whole = all(table.all() for table in checkpoint.selection.kept.values())
    assert whole == ("importance" not in stages)


@pytest.mark.parametrize("count", [2, 3, 8, 9, 20, 64])
def test_the_swap_matrix_of_many_contexts_is_a_sample(count: int) -> None:
    """All pairs up to eight contexts; above, seven others for each."""
    contexts = tuple(f"c{index}" for index in range(count))
    table = np.arange(count)[:, None, None] % 2 == np.arange(2)
    selection = Selection(contexts, {UnitKind.FFN: table})
    tried: list[tuple[str, str]] = []

    def perplexities(_name: str, _state: object, swaps: list[dict[str, str]]) -> list[dict[str, float]]:
        tried.extend(pair for swap in swaps for pair in swap.items())
        return [{text: 100.0 * int(text[1:]) + int(units[1:]) for text, units in swap.items()} for swap in swaps]

    run = SimpleNamespace(corpus=SimpleNamespace(contexts=contexts), perplexities=perplexities)
    found = swap_matrix(run, SimpleNamespace(selection=selection), dict.fromkeys(contexts, 1.0))
    others = min(count, 8) - 1
    assert len(set(tried)) == len(tried) == count * others and all(text != units for text, units in tried)
    for row, values in enumerate(found["perplexity"]):
        known = {column: value for column, value in enumerate(values) if value is not None}
        assert known.pop(row) == 1.0 and len(known) == others
        assert all(value == 100.0 * row + column for column, value in known.items())


def test_every_stage_counts_up_to_its_total(corpus: Corpus, model_config: ModelConfig, tmp_path: Path) -> None:
    _, seen = run(corpus, model_config, tmp_path / "model.pt")
    assert seen.stages["importance"] == (6, 6)  # two batches of three contexts
    assert seen.stages["evaluate partition"] == (12, 12)  # four windows of three contexts
    assert seen.stages["evaluate swapped units"] == (24, 24)  # with the units of two other contexts


def test_a_recalibration_counts_its_batches(corpus: Corpus, model_config: ModelConfig, tmp_path: Path) -> None:
    _, seen = run(corpus, model_config, tmp_path / "model.pt", steps=8)
    assert seen.stages["recalibration"] == (6, 6)


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_a_teacher_is_asked_only_where_it_counts(
    distill: float, corpus: Corpus, model_config: ModelConfig, tmp_path: Path
) -> None:
    _, seen = run(corpus, model_config, tmp_path / "model.pt", distill=distill)
    assert seen.taught == (distill > 0)


class Logits:
    """The largest number of logits that any model has made in one pass."""

    def __init__(self) -> None:
        self.most = 0

    def __call__(self, module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(module, Decoder):
            assert isinstance(output, Tensor)
            self.most = max(self.most, output.numel())


def test_logits_of_a_large_vocabulary_are_made_in_pieces(
    corpus: Corpus, model_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(corpus, model_config, tmp_path / "whole.pt")
    monkeypatch.setattr(language_model, "LOGITS", 1)
    logits = Logits()
    with torch.nn.modules.module.register_module_forward_hook(logits):
        pieces, _ = run(corpus, model_config, tmp_path / "pieces.pt")
    assert logits.most == SHORT.sequence * model_config.vocabulary  # of one sequence
    for branch, expected in whole.training["perplexity"].items():
        assert pieces.training["perplexity"][branch] == pytest.approx(expected, rel=1e-4)


def test_importance_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = preset("nano")
    model, windows = Decoder(config, contexts=1).double(), torch.randint(0, config.vocabulary, (5, 9))
    whole = measure_importance(model, [windows], None)
    monkeypatch.setattr(language_model, "LOGITS", 2 * 9 * config.vocabulary)
    assert [len(piece) for piece in model.pieces(windows)] == [2, 2, 1]
    pieces = measure_importance(model, [windows], None)
    for kind in (UnitKind.FFN, UnitKind.HEAD):
        assert np.allclose(whole[kind], pieces[kind], rtol=1e-9, atol=0)
