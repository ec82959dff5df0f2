"""Progress of work in stages: what a long loop calls, whatever shows it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from cpcompile.core.types import Progress

T = TypeVar("T")


class StageProgress:
    """Calls `progress` when a stage begins, when it ends, and ten times a second at most in between."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._name = ""
        self._done = 0
        self._total: int | None = None
        self._last = 0.0

    def stage(self, name: str, total: int | None) -> None:
        """Begin the stage `name` of `total` units; None if their number is unknown."""
        self._name, self._done, self._total = name, 0, total
        self.end()

    def add(self, amount: int = 1) -> None:
        """`amount` further units are done."""
        self._done += amount
        if self._done == self._total or time.perf_counter() - self._last >= 0.1:
            self.end()

    def reach(self, done: int) -> None:
        """`done` units are done, of all."""
        self.add(done - self._done)

    def end(self) -> None:
        """Report at once."""
        self._last = time.perf_counter()
        if self._progress:
            self._progress(self._name, self._done, self._total)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield each of `items`; it is done when the next one is asked for."""
        for item in items:
            yield item
            self.add()
