"""Progress of the stages that make a corpus."""

from __future__ import annotations

import time

from cpcompile.core.types import Progress


class StageProgress:
    """Calls `progress` when a stage begins, after every context, and ten times a second at most in between."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._name = ""
        self._done = 0
        self._total: int | None = None
        self._last = 0.0

    def stage(self, name: str, total: int | None) -> None:
        self._name, self._done, self._total = name, 0, total
        self.end()

    def add(self, amount: int) -> None:
        self._done += amount
        if time.perf_counter() - self._last >= 0.1:
            self.end()

    def end(self) -> None:
        self._last = time.perf_counter()
        if self._progress:
            self._progress(self._name, self._done, self._total)
