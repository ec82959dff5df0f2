"""Progress of the commands: bars with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from cpcompile.core import types

if TYPE_CHECKING:
    from cpcompile.training.branch import StepReport  # torch, without which `doctor` prints its tables as well

console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
"""Progress and messages go to standard error, one record per line however long; results go to standard output.

Paths may have brackets, which are no markup.
"""

WIDTH = 120
"""Columns of tables in a log or a file, where there is no terminal width to use."""
QUIET = 10.0
"""Seconds without a line, where there are no bars."""


def clock(seconds: float) -> str:
    """`0:02:30`."""
    return str(timedelta(seconds=math.ceil(seconds)))


def print_result(result: RenderableType, file: TextIO | None = None) -> None:
    """Print a result to standard output, or to `file`."""
    out = Console(file=file)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = WIDTH
    out.print(result)


@contextmanager
def stage_progress() -> Iterator[types.Progress]:
    """A bar per stage on a terminal, with the time left; elsewhere lines."""
    if not console.is_terminal:
        yield _Lines()
        return
    with _bars() as bars:
        tasks: dict[str, TaskID] = {}
        parts: dict[str, TaskID] = {}

        def update(name: str, done: int, total: int | None) -> None:
            whole, _, part = name.partition(": ")
            if name not in tasks:
                if whole in parts:  # the part before it is over
                    bars.update(parts.pop(whole), visible=False)
                tasks[name] = bars.add_task(name, total=total, note="")
                if part:
                    parts[whole] = tasks[name]
            bars.update(tasks[name], completed=done, total=total)
            if not part and whole in parts and done == total:
                bars.update(parts.pop(whole), visible=False)

        yield update


class _Lines:
    """A line when a stage begins, and one every QUIET seconds while it lasts, with the time left."""

    def __init__(self) -> None:
        self._pace: dict[str, _Pace] = {}
        self._last = 0.0

    def __call__(self, name: str, done: int, total: int | None) -> None:
        first = name not in self._pace
        pace = self._pace.setdefault(name, _Pace(done))
        if (first and ": " not in name) or time.monotonic() - self._last > QUIET:
            self._last = time.monotonic()
            count = "" if first or total is None else f" {done:,} of {total:,}{pace.left(done, total)}"
            console.print(f"{name}{count} …")


class _Pace:
    """How long the rest of some work takes, if it goes on like before."""

    def __init__(self, done: int) -> None:
        self._first, self._began, self._started = done, time.monotonic(), False

    def left(self, done: int, total: int) -> str:
        """`, 0:01:30 left`; empty while it is not known."""
        if done <= self._first or done >= total:
            return ""
        few = done - self._first < (total - self._first) / 20
        seconds = (time.monotonic() - self._began) * (total - done) / (done - self._first)
        if not self._started:  # what comes before the first unit, such as warming up, is not repeated
            self._first, self._began, self._started = done, time.monotonic(), True
            if few:  # and would be taken many times
                return ""
        return f", {clock(seconds)} left"


class TrainProgress:
    """Observer of a training run: the whole run and the current branch, loss, tokens/s and held-out perplexity."""

    def __init__(self, planned: Mapping[str, int]) -> None:
        self._planned = planned
        self._done: dict[str, int] = {}
        self._pace: _Pace | None = None
        self._last_line = 0.0

    def __enter__(self) -> TrainProgress:
        self._bars = _bars()
        if console.is_terminal:
            self._bars.start()
        self._whole = self._bars.add_task("all branches", total=sum(self._planned.values()), note="")
        self._tasks: dict[str, TaskID] = {}
        return self

    def __exit__(self, *exception: object) -> None:
        if console.is_terminal:
            self._bars.stop()

    def __call__(self, report: StepReport) -> None:
        branch, done = report.branch, report.step - report.first
        if branch not in self._tasks:
            # A resumed run finds earlier branches finished: they count as done.
            names = list(self._planned)
            for earlier in names[: names.index(branch)]:
                self._done.setdefault(earlier, self._planned[earlier])
            self._tasks[branch] = self._bars.add_task(branch, total=report.last - report.first, note="")
        self._done[branch] = done
        whole, total = sum(self._done.values()), sum(self._planned.values())
        self._pace = self._pace or _Pace(whole)
        left = "" if console.is_terminal else self._pace.left(whole, total)
        note = f"loss {report.loss:.3f}  {report.tokens_per_second:,.0f} tokens/s"
        self._bars.update(self._tasks[branch], completed=done, note=note)
        self._bars.update(self._whole, completed=whole)
        if report.perplexity is not None:
            values = "  ".join(f"{context} {value:.2f}" for context, value in report.perplexity.items())
            self._bars.console.print(f"{branch:<22} step {report.step:>6}  {note}  perplexity: {values}{left}")
        elif not console.is_terminal and time.monotonic() - self._last_line > QUIET:
            self._last_line = time.monotonic()
            console.print(f"{branch:<22} step {report.step:>6} of {report.last}  {note}{left}")


class _TimeColumn(ProgressColumn):
    """The time left; where it is not known, and at the end, the time so far."""

    def render(self, task: Task) -> Text:
        left = None if task.finished else task.time_remaining
        if left is not None:
            return Text(f"{clock(left)} left", style="progress.remaining")
        return Text(clock(task.finished_time or task.elapsed or 0), style="progress.elapsed")


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<21}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=24)),
        MofNCompleteColumn(),
        _TimeColumn(),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
        console=console,
        expand=console.width < 100,  # so that a narrow terminal shortens the bar, not the figures
        speed_estimate_period=600,  # seconds: a unit of some stages takes minutes
    )
