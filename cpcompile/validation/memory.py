"""Memory and start: what loading and running costs, engine and eager dense baseline each in a fresh process.

    python -m cpcompile.validation.memory engine  INPUTS THREADS BUNDLE CONTEXT VARIANT     (torch only for a plan)
    python -m cpcompile.validation.memory eager   INPUTS THREADS CHECKPOINT
    python -m cpcompile.validation.memory program INPUTS THREADS PROGRAM CONTEXT

`cpcompile.machine.memory` says how; this module is what the parent calls and what its child runs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cpcompile.core.errors import CpcompileError
from cpcompile.machine.gpu import video_memory
from cpcompile.machine.memory import NO_PRIVATE, ProcessMemory, measure_memory
from cpcompile.machine.subprocesses import in_fresh_process

if TYPE_CHECKING:
    from cpcompile.core.types import Feeds  # not at run time: what onnxruntime weighs is not the eager model's

RUNS = 3
Sides = TypeVar("Sides", "Memory", "Start")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak resident bytes, by the kernel, and peak private bytes, of samples, as `cpcompile.machine.memory` says.

    `base` is the process with its libraries before anything is loaded.
    """

    load_peak_rss_bytes: int | None
    run_peak_rss_bytes: int | None
    base_rss_bytes: int | None
    load_peak_private_bytes: int | None
    run_peak_private_bytes: int | None
    base_private_bytes: int | None
    eager_load_peak_rss_bytes: int | None
    eager_run_peak_rss_bytes: int | None
    eager_base_rss_bytes: int | None
    eager_load_peak_private_bytes: int | None
    eager_run_peak_private_bytes: int | None
    eager_base_private_bytes: int | None
    vram_bytes: int | None
    """Of the engine."""
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """Field -> why it is null."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """From nothing to the first answer, in milliseconds: loading, and the first run. One sample each."""

    load_ms: float | None
    first_run_ms: float | None
    eager_load_ms: float | None
    eager_first_run_ms: float | None
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """Field -> why it is null."""


def compare_memory(engine: ProcessMemory | str, eager: ProcessMemory | str) -> Memory:
    """Put both sides together; a side that was not measured is the reason why."""
    return _both(Memory, engine, eager)


def compare_start(engine: ProcessMemory | str, eager: ProcessMemory | str) -> Start:
    """As `compare_memory`."""
    return _both(Start, engine, eager)


def _both(kind: type[Sides], engine: ProcessMemory | str, eager: ProcessMemory | str) -> Sides:
    """The fields of `kind` from both sides, by name."""
    sides = {"": engine, "eager_": eager}
    values, reasons = {}, {}
    for name in (item.name for item in dataclasses.fields(kind) if item.name != "not_measured"):
        prefix = "eager_" if name.startswith("eager_") else ""
        side = sides[prefix]
        values[name] = None if isinstance(side, str) else getattr(side, name.removeprefix(prefix))
        if values[name] is None:
            reasons[name] = side if isinstance(side, str) else _why_unknown(name)
    return kind(**values, not_measured=reasons)


def _why_unknown(name: str) -> str:
    """Why a process that was measured does not say `name`; this one runs on the same system."""
    return str(video_memory()) if name == "vram_bytes" else NO_PRIVATE


def measure_engine(bundle: Path, context: str, variant: str, feeds: Feeds, *, threads: int) -> ProcessMemory | str:
    """Memory of an engine in a process of its own, or why it could not be measured."""
    return _measure("engine", feeds, threads, str(bundle), context, variant)


def measure_eager(checkpoint: Path, feeds: Feeds, *, threads: int) -> ProcessMemory | str:
    """Memory of the eager model of a dense checkpoint in a process of its own, or why it could not be measured."""
    return _measure("eager", feeds, threads, str(checkpoint))


def measure_program(program: Path, context: str, feeds: Feeds, *, threads: int) -> ProcessMemory | str:
    """Memory of an exported program with its gates, in a process of its own, or why it could not be measured."""
    return _measure("program", feeds, threads, str(program), context)


def _measure(side: str, feeds: Feeds, threads: int, *arguments: str) -> ProcessMemory | str:
    with tempfile.TemporaryDirectory(prefix="cpcompile-inputs-") as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **dict(feeds))  # type: ignore[arg-type]
        command = ("-m", "cpcompile.validation.memory", side, str(inputs), str(threads), *arguments)
        try:
            return ProcessMemory(**in_fresh_process(*command))
        except CpcompileError as error:
            return str(error)


def _engine_process(feeds: Feeds, threads: int, bundle: str, context: str, variant: str) -> ProcessMemory:
    from cpcompile.bundle.reader import open_bundle

    chosen = open_bundle(Path(bundle)).variant(context, variant)
    if chosen.plan:
        from cpcompile.runtime.plan import load_plan  # its buffers are torch's, whose libraries are in the base

        return measure_memory(lambda: load_plan(chosen), lambda engine: engine.outputs(feeds), runs=RUNS)

    from cpcompile.runtime.engine import load_engine

    memory = measure_memory(
        lambda: load_engine(open_bundle(Path(bundle)), context, variant, threads=threads),
        lambda engine: engine.outputs(feeds),
        runs=RUNS,
    )
    if "torch" in sys.modules:
        raise CpcompileError("the engine's process imported torch: its memory would be torch's")
    return memory


def _eager_process(feeds: Feeds, threads: int, checkpoint: str) -> ProcessMemory:
    import torch

    from cpcompile.frontend.checkpoint import load_checkpoint
    from cpcompile.models.language_model import LanguageModel

    torch.set_num_threads(threads)
    ids = torch.from_numpy(feeds["input_ids"])

    def run(model: LanguageModel) -> None:
        with torch.inference_mode():
            model(ids)

    return measure_memory(lambda: load_checkpoint(Path(checkpoint)).model, run, runs=RUNS)


def _program_process(feeds: Feeds, threads: int, program: str, context: str) -> ProcessMemory:
    import torch

    from cpcompile.frontend.program import load_program

    torch.set_num_threads(threads)
    return measure_memory(
        lambda: load_program(Path(program)).eager(context),
        lambda run: run(feeds),
        runs=RUNS,
    )


def main(arguments: Sequence[str]) -> None:
    """The child: measure one side and print it as one line of JSON."""
    side, inputs, threads, *rest = arguments
    sides: dict[str, Callable[..., ProcessMemory]] = {
        "engine": _engine_process,
        "eager": _eager_process,
        "program": _program_process,
    }
    with np.load(inputs, allow_pickle=False) as file:
        feeds = dict(file)
    print(json.dumps(dataclasses.asdict(sides[side](feeds, int(threads), *rest))))


if __name__ == "__main__":
    main(sys.argv[1:])
