"""The stages of a build, with their time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cpcompile.core.measured import NotMeasured
from cpcompile.core.stage_progress import StageProgress
from cpcompile.core.types import Progress
from cpcompile.machine.memory import NO_PRIVATE, PrivatePeak, peak_resident_bytes, reset_peak
from cpcompile.report import BuildResult, BuildStage


class Stages:
    """Names, times and peak memory of the stages of a build."""

    def __init__(self, progress: Progress) -> None:
        reset_peak()  # after training in the same process, count from its current memory
        self._progress = progress
        self._stages: list[BuildStage] = []

    @contextmanager
    def __call__(self, name: str, units: int = 1) -> Iterator[Callable[[], None]]:
        """A stage of so many units; the function that is yielded is called after each."""
        report = StageProgress(self._progress)
        report.stage(name, units)
        started = time.perf_counter()
        with PrivatePeak() as private:
            yield report.add
        self._stages.append(
            BuildStage(
                name=name,
                seconds=time.perf_counter() - started,
                peak_rss_bytes=peak_resident_bytes(),
                peak_private_bytes=private.bytes,
            )
        )
        self._progress(name, units, units)

    def result(self) -> BuildResult:
        """Time and memory of the stages so far."""
        private = [stage.peak_private_bytes for stage in self._stages if stage.peak_private_bytes is not None]
        return BuildResult(
            seconds=sum(stage.seconds for stage in self._stages),
            peak_rss_bytes=peak_resident_bytes(),
            peak_private_bytes=max(private) if private else NotMeasured(NO_PRIVATE),
            stages=tuple(self._stages),
        )
