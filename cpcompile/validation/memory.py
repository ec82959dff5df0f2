"""Memory: what loading and running costs, engine and eager dense baseline each in a fresh process.

    python -m cpcompile.validation.memory engine BUNDLE CONTEXT VARIANT THREADS     (never imports torch)
    python -m cpcompile.validation.memory eager  CHECKPOINT THREADS

`cpcompile.measure` says how; this module is what the parent calls and what its child runs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cpcompile.errors import CpcompileError
from cpcompile.measure import ProcessMemory, in_fresh_process, measure_memory

SHAPE = (1, 128)
"""(batch, sequence) of the runs."""
RUNS = 3


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak resident bytes; `base` is the process with its libraries before anything is loaded."""

    load_peak_rss_bytes: int | None
    run_peak_rss_bytes: int | None
    base_rss_bytes: int | None
    eager_load_peak_rss_bytes: int | None
    eager_run_peak_rss_bytes: int | None
    eager_base_rss_bytes: int | None
    vram_bytes: int | None = None
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """Field -> why it is null."""


def compare_memory(engine: ProcessMemory | str, eager: ProcessMemory | str) -> Memory:
    """Put both sides together; a side that was not measured is the reason why."""
    values: dict[str, int | None] = {}
    reasons = {"vram_bytes": "the engine runs on the CPU"}
    for prefix, side in (("", engine), ("eager_", eager)):
        for item in dataclasses.fields(ProcessMemory):
            values[prefix + item.name] = None if isinstance(side, str) else getattr(side, item.name)
            if isinstance(side, str):
                reasons[prefix + item.name] = side
    return Memory(**values, not_measured=reasons)


def measure_engine(bundle: Path, context: str, variant: str, *, threads: int) -> ProcessMemory | str:
    """Memory of an engine in a process of its own, or why it could not be measured."""
    return _measure("engine", str(bundle), context, variant, str(threads))


def measure_eager(checkpoint: Path, *, threads: int) -> ProcessMemory | str:
    """Memory of the eager model of a dense checkpoint in a process of its own, or why it could not be measured."""
    return _measure("eager", str(checkpoint), str(threads))


def _measure(*arguments: str) -> ProcessMemory | str:
    try:
        return ProcessMemory(**in_fresh_process("-m", "cpcompile.validation.memory", *arguments))
    except CpcompileError as error:
        return str(error)


def _engine_process(bundle: str, context: str, variant: str, threads: str) -> ProcessMemory:
    from cpcompile.bundle import open_bundle
    from cpcompile.runtime import Engine, load_engine

    def run(engine: Engine) -> None:
        for _ in range(RUNS):
            engine.run(np.zeros(SHAPE, dtype=np.int64))

    memory = measure_memory(lambda: load_engine(open_bundle(Path(bundle)), context, variant, threads=int(threads)), run)
    if "torch" in sys.modules:
        raise CpcompileError("the engine's process imported torch: its memory would be torch's")
    return memory


def _eager_process(checkpoint: str, threads: str) -> ProcessMemory:
    import torch

    from cpcompile.checkpoint import load_checkpoint
    from cpcompile.models.language_model import LanguageModel

    torch.set_num_threads(int(threads))

    def run(model: LanguageModel) -> None:
        with torch.inference_mode():
            for _ in range(RUNS):
                model(torch.zeros(SHAPE, dtype=torch.int64))

    return measure_memory(lambda: load_checkpoint(Path(checkpoint)).model, run)


def main(arguments: Sequence[str]) -> None:
    """The child: measure one side and print it as one line of JSON."""
    side, *rest = arguments
    sides: dict[str, Callable[..., ProcessMemory]] = {"engine": _engine_process, "eager": _eager_process}
    print(json.dumps(dataclasses.asdict(sides[side](*rest))))


if __name__ == "__main__":
    main(sys.argv[1:])
