"""`cpcompile compare`: any two ONNX files: whether they are the same function, how large, how fast.

    sizes -> outputs on random and on given inputs (`validation.compare`) -> interleaved timings (`validation.speed`)

The verdict is that of the outputs; sizes and speed are for the reader, unless a minimum speed ratio is required.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cpcompile.core.types import Feeds, Progress, Steps, unwatched
from cpcompile.files.onnx_file import Size, load_onnx, size_of
from cpcompile.machine.environment import available_cores
from cpcompile.report.results import Speed
from cpcompile.validation.output_comparison import Comparison, compare_files, given_or_random
from cpcompile.validation.reference import Timed
from cpcompile.validation.runners import onnx_runner
from cpcompile.validation.speed import measure_speed

NO_SPEED = "speed measurements were switched off"
NOT_THE_SAME = "the candidate does not compute the same"


@dataclass(frozen=True, kw_only=True)
class FileComparison:
    """Everything about two files. In `speed` the candidate is the engine, and the original takes the role of eager."""

    original: Size
    candidate: Size
    outputs: Comparison
    speed: Speed

    @property
    def verdict(self) -> str:
        """The worse of both."""
        both = (self.outputs.verdict, self.speed.verdict)
        return next(verdict for verdict in ("fail", "inconclusive", "pass") if verdict in both)


def compare_models(
    original: Path,
    candidate: Path,
    *,
    inputs: Sequence[Feeds] = (),
    rounds: int | None = None,
    min_speed_ratio: float = 0.0,
    progress: Progress = lambda *_: None,
) -> FileComparison:
    """Compare `candidate` with `original`, on `inputs` (by name) and on random ones; without `rounds` no timings."""
    progress("read", 0, None)
    sizes = [size_of(load_onnx(path)) for path in (original, candidate)]
    progress("compare", 0, None)
    outputs = compare_files(original, candidate, inputs=inputs)
    if outputs.verdict != "pass":
        speed = Speed.without(outputs.reason or NOT_THE_SAME)
    elif rounds is None:
        speed = Speed.without(NO_SPEED)
    else:
        speed = time_models(original, candidate, inputs, rounds, min_speed_ratio, partial(progress, "time"))
    return FileComparison(original=sizes[0], candidate=sizes[1], outputs=outputs, speed=speed)


def time_models(
    original: Path,
    candidate: Path,
    inputs: Sequence[Feeds],
    rounds: int,
    min_speed_ratio: float = 0.0,
    steps: Steps = unwatched,
) -> Speed:
    """Time both side by side on the largest of `inputs`, or of random inputs if there are none."""
    threads = available_cores()
    feeds = max(given_or_random(original, inputs), key=lambda each: sum(array.size for array in each.values()))
    leading = next((array.shape[0] for array in feeds.values() if array.ndim), 1)
    timed = Timed(leading, None, feeds)
    with ExitStack() as loaded:
        first, second = (
            loaded.enter_context(onnx_runner(path.name, path, threads=threads, computes="context").load())
            for path in (original, candidate)
        )
        return measure_speed(
            second,
            first,
            [timed],
            rounds=rounds,
            threads=threads,
            least_ratio=min_speed_ratio,
            against="the original",
            steps=steps,
        )
