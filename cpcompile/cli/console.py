"""Progress of the commands: bars with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from cpcompile.core import types

if TYPE_CHECKING:
    from cpcompile.training.branch import StepReport  # torch, without which `doctor` prints its tables as well

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress and messages go to standard error, one record per line however long; results go to standard output."""

WIDTH = 120
"""Columns of tables in a log or a file, where there is no terminal width to use."""


def print_result(result: RenderableType, file: TextIO | None = None) -> None:
    """Print a result to standard output, or to `file`."""
    out = Console(file=file)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = WIDTH
    out.print(result)


@contextmanager
def stage_progress() -> Iterator[types.Progress]:
    """A bar per stage on a terminal; elsewhere one line when a stage begins."""
    if not console.is_terminal:
        seen: set[str] = set()

        def line(name: str, done: int, total: int | None) -> None:
            if name not in seen:
                seen.add(name)
                console.print(f"{name} …")

        yield line
        return
    with _bars() as bars:
        tasks: dict[str, TaskID] = {}

        def update(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, note="")
            bars.update(tasks[name], completed=done, total=total)

        yield update


class TrainProgress:
    """Observer of a training run: the whole run and the current branch, loss, tokens/s and held-out perplexity."""

    def __init__(self, planned: Mapping[str, int]) -> None:
        self._planned = planned
        self._done: dict[str, int] = {}
        self._last_line = 0.0

    def __enter__(self) -> TrainProgress:
        self._bars = _bars()
        if console.is_terminal:
            self._bars.start()
        self._whole = self._bars.add_task("all branches", total=sum(self._planned.values()), note="")
        self._tasks: dict[str, TaskID] = {}
        return self

    def __exit__(self, *exception: object) -> None:
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
        note = f"loss {report.loss:.3f}  {report.tokens_per_second:,.0f} tokens/s"
        self._bars.update(self._tasks[branch], completed=done, note=note)
        self._bars.update(self._whole, completed=sum(self._done.values()))
        if report.perplexity is not None:
            values = "  ".join(f"{context} {value:.2f}" for context, value in report.perplexity.items())
            self._bars.console.print(f"{branch:<22} step {report.step:>6}  {note}  perplexity: {values}")
        elif not console.is_terminal and time.monotonic() - self._last_line > 30:
            self._last_line = time.monotonic()
            console.print(f"{branch:<22} step {report.step:>6} of {report.last}  {note}")


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<21}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=24)),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
        console=console,
        expand=console.width < 100,  # so that a narrow terminal shortens the bar, not the figures
    )
