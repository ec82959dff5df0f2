"""Whole training runs: interruption and resume, seeds, controls, bad numbers."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cpcompile.core.config import CONTROLS, ModelConfig, TrainConfig
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.paths import dense_path
from cpcompile.core.selection import UnitKind
from cpcompile.files.whole_files import only_process
from cpcompile.frontend.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cpcompile.text.corpus import Corpus
from cpcompile.training.branch import StepReport, learning_rate, swap_fraction
from cpcompile.training.trainer import planned_steps, train, work_path
from tests.conftest import TRAIN


def same(first: Checkpoint, second: Checkpoint) -> bool:
    assert first.state.keys() == second.state.keys()
    return all(torch.equal(value, second.state[name]) for name, value in first.state.items())


def test_a_run_writes_both_checkpoints_and_clears_its_work(trained: Path) -> None:
    assert sorted(p.name for p in trained.parent.iterdir()) == ["model.dense.pt", "model.pt"]
    assert load_checkpoint(dense_path(trained)).selection is None


def test_every_context_keeps_its_budget(trained: Path) -> None:
    selection = load_checkpoint(trained).selection
    assert selection is not None
    assert set(selection.kept[UnitKind.FFN].mean(axis=(1, 2))) == {0.25}
    assert set(selection.kept[UnitKind.HEAD].mean(axis=(1, 2))) == {0.5}


def test_gates_are_zero_exactly_where_a_unit_is_not_kept(trained: Path) -> None:
    checkpoint = load_checkpoint(trained)
    assert checkpoint.selection is not None
    for layer in range(checkpoint.config.layers):
        for kind, name in ((UnitKind.FFN, "ffn_gate"), (UnitKind.HEAD, "head_gate")):
            table = checkpoint.state[f"layers.{layer}.{name}.table"].numpy()
            assert np.array_equal(table != 0, checkpoint.selection.kept[kind][:, layer])


def test_the_checkpoint_tells_where_it_comes_from(trained: Path, corpus: Corpus) -> None:
    training = load_checkpoint(trained).training
    assert training["data_digests"] == dict(corpus.digests)
    assert set(training["perplexity"]) == {"dense-baseline", "partition"}
    assert set(training["controls"]) == {"one-mask", "small-dense"}
    assert np.asarray(training["swap_matrix"]["perplexity"]).shape == (3, 3)
    for i, context in enumerate(corpus.contexts):
        diagonal = training["swap_matrix"]["perplexity"][i][i]
        assert diagonal == pytest.approx(training["perplexity"]["partition"][context], rel=1e-9)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(
    trained: Path, corpus: Corpus, model_config: ModelConfig, tmp_path: Path
) -> None:
    again = train(corpus, model_config, TRAIN, tmp_path / "again.pt")
    assert same(again, load_checkpoint(trained))
    other = dataclasses.replace(TRAIN, seed=1, steps=4, controls=())
    assert not same(train(corpus, model_config, other, tmp_path / "other.pt"), again)


class StopRunError(Exception):
    """Interrupts a run from its observer."""


@pytest.mark.parametrize(
    ("branch", "step"),
    [
        pytest.param("parent", 5, marks=pytest.mark.slow),
        pytest.param("dense-baseline", 13, marks=pytest.mark.slow),
        ("partition", 19),
        pytest.param("one-mask", 24, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_result(
    trained: Path, corpus: Corpus, model_config: ModelConfig, tmp_path: Path, branch: str, step: int
) -> None:
    def stop(report: StepReport) -> None:
        if (report.branch, report.step) == (branch, step):
            raise StopRunError

    out = tmp_path / "model.pt"
    with pytest.raises(UsageError, match="no interrupted run"):
        train(corpus, model_config, TRAIN, out, resume=True)
    with pytest.raises(StopRunError):
        train(corpus, model_config, TRAIN, out, observer=stop)
    assert not out.exists()
    with pytest.raises(UsageError, match="--resume"):
        train(corpus, model_config, TRAIN, out)
    with pytest.raises(UsageError, match=r"other settings \(train seed: 0 then, 9 now\)"):
        train(corpus, model_config, dataclasses.replace(TRAIN, seed=9), out, resume=True)
    with (
        only_process(work_path(out) / "lock", "unused"),
        pytest.raises(UsageError, match="another process is training there"),
    ):
        train(corpus, model_config, TRAIN, out, resume=True)
    assert same(train(corpus, model_config, TRAIN, out, resume=True), load_checkpoint(trained))


@pytest.mark.parametrize("record", [None, "", "[]", "\xff"])
def test_a_work_folder_without_its_record_is_not_used(
    corpus: Corpus, model_config: ModelConfig, tmp_path: Path, record: str | None
) -> None:
    folder = work_path(tmp_path / "model.pt")
    folder.mkdir()
    (folder / "parent.pt").write_bytes(b"of some other run")
    if record is not None:
        (folder / "run.json").write_text(record, encoding="latin-1")
    with pytest.raises(UsageError, match="an interrupted run is there"):
        train(corpus, model_config, TRAIN, tmp_path / "model.pt")
    with pytest.raises(UsageError, match=r"run.json: cannot be read .*delete .*model.pt.work"):
        train(corpus, model_config, TRAIN, tmp_path / "model.pt", resume=True)


@pytest.mark.slow
def test_kill_between_the_two_checkpoints_and_resume(
    trained: Path, corpus: Corpus, model_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new baseline beside an older model is not a pair, and the run can be ended."""
    out = tmp_path / "model.pt"
    train(corpus, model_config, dataclasses.replace(TRAIN, steps=4, controls=()), out)

    def save_one(checkpoint: Checkpoint, path: Path) -> None:
        if path == out:
            raise StopRunError
        save_checkpoint(checkpoint, path)

    with monkeypatch.context() as patch:
        patch.setattr("cpcompile.training.trainer.save_checkpoint", save_one)
        with pytest.raises(StopRunError):
            train(corpus, model_config, TRAIN, out)
    runs = [load_checkpoint(path).training["run"] for path in (out, dense_path(out))]
    assert runs[0] != runs[1]
    assert same(train(corpus, model_config, TRAIN, out, resume=True), load_checkpoint(trained))
    assert load_checkpoint(out).training["run"] == load_checkpoint(dense_path(out)).training["run"] == runs[1]


@pytest.mark.slow
def test_kill_9_and_resume(trained: Path, corpus_folder: Path, cache: Path, tmp_path: Path) -> None:
    """The real command, killed in the middle of the partition phase."""
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f"[train]\nsequence = 32\nbatch = 4\nimportance_sequences = 8\nheld_out_tokens = 1024\nrecalibrations = 2\n"
        f"swap_fraction = 0.3\nsnapshot_seconds = 0.001\ncontrols = {list(TRAIN.controls)}\n"
    )
    out = tmp_path / "model.pt"
    command = [sys.executable, "-m", "cpcompile", "train", "--data", str(corpus_folder), "--cache", str(cache)]
    command += ["--out", str(out), "--preset", "nano", "--steps", "24", "--config", str(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        seen = ""
        for line in process.stderr:
            seen += line
            if line.startswith("partition"):
                process.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail(f"the run ended before it could be killed:\n{seen}")
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert work_path(out).is_dir()
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "were those of the first 2,048 held-out tokens of each context, so they differ" in resumed.stderr
    shown = " ".join(resumed.stdout.split())
    assert "held-out perplexity of up to 1,024 tokens per context" in shown and "beats dense-baseline" not in shown
    assert same(load_checkpoint(out), load_checkpoint(trained))


def test_a_loss_that_is_not_finite_stops_before_the_update(
    corpus: Corpus, model_config: ModelConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(TRAIN, learning_rate=1e18, warmup_fraction=0.0, clip=1e18)
    with pytest.raises(CpcompileError, match=r"not finite at step \d+.*update was not made.*lower learning rate"):
        train(corpus, model_config, config, tmp_path / "model.pt")


def test_a_run_that_diverges_without_infinities_is_a_sentence(
    corpus: Corpus, model_config: ModelConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(TRAIN, learning_rate=1e3, controls=())
    with pytest.raises(CpcompileError, match=r"diverged; try a lower learning rate|not finite"):
        train(corpus, model_config, config, tmp_path / "model.pt", observer=lambda _: None)


def test_every_control_can_be_trained(corpus: Corpus, model_config: ModelConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(TRAIN, steps=4, controls=CONTROLS, held_out_tokens=64)
    seen: dict[str, int] = {}

    def count(report: StepReport) -> None:
        seen[report.branch] = seen.get(report.branch, 0) + 1

    checkpoint = train(corpus, model_config, config, tmp_path / "model.pt", observer=count)
    assert set(checkpoint.training["controls"]) == set(CONTROLS)
    assert seen == planned_steps(config)


def test_the_held_out_sample_can_be_left_out(corpus: Corpus, model_config: ModelConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(TRAIN, steps=2, controls=())
    assert train(corpus, model_config, config, tmp_path / "model.pt", held_out=False).held_out == {}


def test_the_schedule_warms_up_stays_and_decays() -> None:
    config = TrainConfig(steps=100, warmup_fraction=0.1, decay_fraction=0.2, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert min(rates[80:]) == rates[99] == pytest.approx(0.05)


def test_recalibrations_decay_and_stop() -> None:
    config = TrainConfig(recalibrations=4, swap_fraction=0.2, recalibrate_until=0.65)
    fractions = {done: f for done in range(1, 201) if (f := swap_fraction(done, 200, config))}
    assert len(fractions) == 4
    assert max(fractions) < 130
    assert list(fractions.values()) == sorted(fractions.values(), reverse=True)
