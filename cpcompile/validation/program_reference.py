"""An exported program as the reference of its engines: its examples, at other lengths as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Array, Feeds, Steps, unwatched
from cpcompile.files.whole_files import file_digest
from cpcompile.frontend.program import Program
from cpcompile.machine.memory import ProcessMemory
from cpcompile.report.results import Quality
from cpcompile.validation.memory import measure_program
from cpcompile.validation.reference import UNROUNDED, Run, Schemes, Timed

NO_QUALITY = "the quality of a program is for its own task to say"


class ProgramReference:
    """The program with the gates of a context; there is no other eager model, so speed is compared with it too."""

    logits: str | None = None
    no_inputs = "the program brings no examples of this context"

    def __init__(self, path: Path, program: Program) -> None:
        self.contexts = program.contexts
        self._path = path
        self.digest = file_digest(path)
        self._program = program
        self._memory: dict[str, ProcessMemory | NotMeasured] = {}

    def masked(self, context: str, schemes: Schemes = UNROUNDED, *, round_inputs: bool = True) -> Run:
        assert not schemes, "engines of programs are not quantised"
        return self._program.eager(context)

    def exact(self, context: str, schemes: Schemes = UNROUNDED) -> Run:
        assert not schemes, "engines of programs are not quantised"
        return self._program.eager(context, double=True)

    def dense(self, context: str) -> Run:
        return self.masked(context)

    def compiled(self, context: str) -> Run:
        return self._program.eager(context, compiled=True)

    def as_engine(self, context: str, run: Run, *, all_logits: bool = False) -> Run:
        return run

    def dense_memory(self, context: str, *, threads: int) -> ProcessMemory | NotMeasured:
        if context not in self._memory:  # the same for all variants
            feeds = self.timed(context)[0].feeds
            self._memory[context] = measure_program(self._path, context, feeds, threads=threads)
        return self._memory[context]

    def inputs(self, context: str) -> Iterator[Feeds]:
        """The examples, then the first of them with each of its free axes as short as may be, and twice as long."""
        examples = self._program.examples[context]
        yield from examples
        for label, (low, high) in self._program.lengths.items():
            own = _length(examples[0], self._program.axes, label) if examples else low
            for length in sorted({low, min(2 * own, high)} - {own}):
                yield {
                    name: _resized(array, self._program.axes.get(name, {}), label, length)
                    for name, array in examples[0].items()
                }

    def timed(self, context: str) -> Sequence[Timed]:
        feeds = self._program.examples[context][0]
        first = feeds[self._program.inputs[0]]
        return [Timed(first.shape[0] if first.ndim else 1, None, feeds)]

    def quality(self, context: str, engine: Run | NotMeasured, *, steps: Steps = unwatched) -> Quality:
        return Quality.without(NO_QUALITY)


def _length(feeds: Feeds, axes: Mapping[str, Mapping[int, str]], label: str) -> int:
    return int(next(feeds[name].shape[axis] for name in axes for axis, own in axes[name].items() if own == label))


def _resized(array: Array, axes: Mapping[int, str], label: str, length: int) -> Array:
    """`array` cut or repeated along its axes of that name."""
    for axis, own in axes.items():
        if own == label:
            array = array.take(np.arange(length) % array.shape[axis], axis=axis)
    return array
