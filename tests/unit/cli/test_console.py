"""Progress in a log and on a terminal: every stage shows how far it is and how long the rest takes."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from cpcompile.cli import console
from cpcompile.cli.console import TrainProgress, clock, stage_progress
from cpcompile.training.branch import StepReport


class Clock:
    """A clock that moves on when it is told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(time, "monotonic", own)
    return own


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    file = io.StringIO()
    own = Console(file=file, force_terminal=terminal, width=150, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "console", own)
    return file


def test_a_log_gets_a_line_now_and_then_with_the_time_left(moving: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    file = shown(monkeypatch, terminal=False)
    with stage_progress() as stage:
        stage("validate", 0, 3)
        for done in range(61):
            stage("validate: speed of a cpu-fp32", done, 60)
            moving.now += 1
        stage("validate", 1, 3)
        stage("layers", 0, None)
        moving.now += 100
        stage("layers", 5, None)
    lines = file.getvalue().splitlines()
    assert lines[0] == "validate …"
    assert lines[1] == "validate: speed of a cpu-fp32 11 of 60, 0:00:49 left …"
    assert lines[2] == "validate: speed of a cpu-fp32 22 of 60, 0:00:38 left …"
    assert lines[-2:] == ["layers …", "layers …"]
    assert "validate 1 of 3" not in file.getvalue()  # within the ten seconds after another line


def test_warming_up_does_not_count_for_ever(moving: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    file = shown(monkeypatch, terminal=False)
    with stage_progress() as stage:
        stage("time", 0, 60)
        moving.now += 100
        for done in range(1, 61):
            stage("time", done, 60)
            moving.now += 11
    assert file.getvalue().splitlines()[1:3] == ["time 1 of 60 …", "time 2 of 60, 0:10:38 left …"]


def report(step: int, branch: str = "partition") -> StepReport:
    return StepReport(branch=branch, step=step, first=10, last=40, loss=2.0, learning_rate=0.1, tokens_per_second=100.0)


def test_training_says_how_long_all_branches_take(moving: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    file = shown(monkeypatch, terminal=False)
    with TrainProgress({"parent": 10, "partition": 30, "one-mask": 30}) as progress:
        for step in range(11, 24):
            progress(report(step))
            moving.now += 4
    lines = file.getvalue().splitlines()
    assert "left" not in lines[0]
    assert "step     17 of 40  loss 2.000  100 tokens/s, 0:03:32 left" in lines[2]  # 53 steps of 4 seconds


def test_training_that_ends_at_once_leaves_no_empty_line_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    file = shown(monkeypatch, terminal=False)
    with TrainProgress({"parent": 10}):
        pass
    assert file.getvalue() == ""


def test_a_terminal_shows_the_part_that_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    file = shown(monkeypatch, terminal=True)
    with stage_progress() as stage:
        stage("validate", 0, 2)
        stage("validate: parity of a", 4, 4)
        stage("validate: speed of a", 10, 60)
        stage("validate: speed of a", 20, 60)
        stage("validate", 2, 2)
    last = file.getvalue().rpartition("validate ")[2]
    assert "parity of a" not in last and "speed of a" not in last
    assert "2/2" in last
    assert "speed of a" in file.getvalue()


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 0.2, 61, 3601)] == ["0:00:00", "0:00:01", "0:01:01", "1:00:01"]
