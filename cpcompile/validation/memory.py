"""Memory and start: what loading and running costs, engine and eager dense baseline each in a fresh process.

    python -m cpcompile.validation.memory engine  INPUTS THREADS BUNDLE CONTEXT VARIANT     (torch only for a plan)
    python -m cpcompile.validation.memory eager   INPUTS THREADS CHECKPOINT
    python -m cpcompile.validation.memory program INPUTS THREADS PROGRAM CONTEXT

`cpcompile.machine.memory` says how; this module is what the parent calls and what its child runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cpcompile.core.errors import CpcompileError
from cpcompile.core.json_form import from_json, to_json
from cpcompile.core.measured import NotMeasured, measurable
from cpcompile.files.whole_files import scratch_folder
from cpcompile.machine.memory import ProcessMemory, measure_memory
from cpcompile.machine.subprocesses import in_fresh_process
from cpcompile.report.results import Memory, Start
from cpcompile.targets.requests import OPENVINO

if TYPE_CHECKING:
    from cpcompile.core.types import Feeds  # not at run time: the memory of onnxruntime is not the eager model's

RUNS = 3
Sides = TypeVar("Sides", "Memory", "Start")


def compare_memory(engine: ProcessMemory | NotMeasured, eager: ProcessMemory | NotMeasured) -> Memory:
    """Combine both sides."""
    return _both(Memory, engine, eager)


def compare_start(engine: ProcessMemory | NotMeasured, eager: ProcessMemory | NotMeasured) -> Start:
    """As `compare_memory`."""
    return _both(Start, engine, eager)


def _both(kind: type[Sides], engine: ProcessMemory | NotMeasured, eager: ProcessMemory | NotMeasured) -> Sides:
    """The fields of `kind` from both sides, by name."""
    sides = {"": engine, "eager_": eager}
    values = {}
    for name in measurable(kind):
        prefix = "eager_" if name.startswith("eager_") else ""
        side = sides[prefix]
        values[name] = side if isinstance(side, NotMeasured) else getattr(side, name.removeprefix(prefix))
    return kind(**values)


def measure_engine(
    bundle: Path, context: str, variant: str, feeds: Feeds, *, threads: int
) -> ProcessMemory | NotMeasured:
    """Memory of an engine in a process of its own, or why it could not be measured."""
    return _measure("engine", feeds, threads, str(bundle), context, variant)


def measure_eager(checkpoint: Path, feeds: Feeds, *, threads: int) -> ProcessMemory | NotMeasured:
    """Memory of the eager model of a dense checkpoint in a process of its own, or why it could not be measured."""
    return _measure("eager", feeds, threads, str(checkpoint))


def measure_program(program: Path, context: str, feeds: Feeds, *, threads: int) -> ProcessMemory | NotMeasured:
    """Memory of an exported program with its gates, in a process of its own, or why it could not be measured."""
    return _measure("program", feeds, threads, str(program), context)


def _measure(side: str, feeds: Feeds, threads: int, *arguments: str) -> ProcessMemory | NotMeasured:
    with scratch_folder("inputs") as folder:
        inputs = folder / "inputs.npz"
        np.savez(inputs, **dict(feeds))  # type: ignore[arg-type]
        command = ("-m", "cpcompile.validation.memory", side, str(inputs), str(threads), *arguments)
        try:
            return from_json(ProcessMemory, in_fresh_process(*command))
        except CpcompileError as error:
            return NotMeasured(str(error))


def _engine_process(feeds: Feeds, threads: int, bundle: str, context: str, variant: str) -> ProcessMemory:
    from cpcompile.bundle.reader import open_bundle

    chosen = open_bundle(Path(bundle)).variant(context, variant)
    if chosen.plan:
        from cpcompile.runtime.plan import load_plan  # its buffers are torch's, whose libraries are in the base

        return measure_memory(lambda: load_plan(chosen), lambda engine: engine.outputs(feeds), runs=RUNS)

    from cpcompile.runtime.engine import load_engine

    if chosen.runtime == OPENVINO:
        import_module(OPENVINO)  # as those of ONNX Runtime are in the base already

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
    print(json.dumps(to_json(sides[side](feeds, int(threads), *rest))))


if __name__ == "__main__":
    main(sys.argv[1:])
