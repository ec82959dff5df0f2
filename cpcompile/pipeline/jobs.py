"""Contexts that are compared with the eager model in several processes, before timings need the machine for themselves.

    python -m cpcompile.pipeline.jobs BUNDLE MODEL CONFIG THREADS [DATA]

reads a context and names of its engines from each line of its input, and answers with their parity and quality.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch

from cpcompile.bundle.reader import Bundle, open_bundle
from cpcompile.core.config import ValidateConfig
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.json_form import from_json, to_json
from cpcompile.core.types import Progress
from cpcompile.frontend.source import open_source
from cpcompile.machine.environment import available_cores
from cpcompile.machine.subprocesses import fresh_processes
from cpcompile.pipeline.references import reference_of
from cpcompile.report.results import NO_RESULTS, Results
from cpcompile.runtime.availability import why_not_here
from cpcompile.validation.comparison import NOT_COMPARED, Compared, EngineComparison, compare_engine
from cpcompile.validation.reference import Reference
from cpcompile.validation.validator import STAGE

ERROR, EXIT_CODE = "error", "exit code"
"""In an answer, in place of engines."""
Opened: TypeAlias = tuple[Bundle, Reference, ValidateConfig, int]
"""What engines are compared with, and in how many threads."""


def compare_in_processes(
    bundle: Bundle,
    model: Path,
    config: ValidateConfig,
    *,
    data: Path | None,
    kept: Results = NO_RESULTS,
    progress: Progress,
) -> Compared:
    """The comparisons of engines for the CPU, `config.jobs` contexts at a time; empty if that makes one process.

    kept: results of engines that are left out. UsageError, CpcompileError: as `compare_engine` raises them;
    CpcompileError: a process failed.
    """
    contexts = {context: names for context in bundle.contexts if (names := _engines(bundle, context, kept))}
    jobs = min(config.jobs, len(contexts))
    if jobs < 2:
        return NOT_COMPARED
    threads = max(1, (config.threads or available_cores()) // jobs)
    found: dict[tuple[str, str], EngineComparison] = {}
    stage = f"{STAGE}: contexts in {jobs} processes"
    arguments = (bundle.root, model, json.dumps(to_json(config)), threads, *([data] if data is not None else []))
    progress(stage, 0, len(contexts))
    with (
        ThreadPoolExecutor(jobs) as pool,
        fresh_processes(jobs, "-m", "cpcompile.pipeline.jobs", *map(str, arguments)) as ask,
    ):
        asked = {pool.submit(ask, json.dumps(question)): question[0] for question in contexts.items()}
        for done, future in enumerate(as_completed(asked), start=1):
            try:
                answer = future.result()
            except CpcompileError as error:
                raise CpcompileError(f"{asked[future]}: {error}; if memory ran out, fewer --jobs need less") from error
            found |= _compared(asked[future], answer)
            progress(stage, done, len(contexts))
    return found


def _engines(bundle: Bundle, context: str, kept: Results) -> list[str]:
    """The names of the engines of `context` that are compared; those on a GPU would share its memory."""
    known = {each.name for each in kept.get(context, ())}
    return [
        each.name
        for each in bundle.variants(context)
        if each.on_cpu and each.name not in known and why_not_here(each) is None
    ]


def _compared(context: str, answer: Mapping[str, Any]) -> Compared:
    if ERROR in answer:
        raise (UsageError if answer[EXIT_CODE] == UsageError.exit_code else CpcompileError)(answer[ERROR])
    return {(context, name): from_json(EngineComparison, each) for name, each in answer.items()}


def _answer(names: Sequence[str], context: str, opened: Opened) -> dict[str, Any]:
    """By the names of engines, what they compute beside the eager model."""
    bundle, reference, config, threads = opened
    found = {}
    for name in names:
        variant = bundle.variant(context, name)
        bundle.verify_engine(variant)
        found[name] = to_json(compare_engine(bundle, variant, reference, config, threads=threads))
    return found


def _open(bundle: str, model: str, config: str, threads: str, data: str | None = None) -> Opened:
    torch.set_num_threads(int(threads))
    settings, opened = from_json(ValidateConfig, json.loads(config)), open_bundle(Path(bundle))
    text = Path(data) if data is not None else None
    reference = reference_of(opened, open_source(Path(model)), settings, data=text, progress=lambda *_: None)
    return opened, reference, settings, int(threads)


def main(*arguments: str) -> None:
    """Answer until there are no more questions, or nobody who asks."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    questions: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    opened = None
    while True:
        context, names = json.loads(questions.get())
        try:
            opened = opened or _open(*arguments)
            answer = _answer(names, context, opened)
        except CpcompileError as error:
            answer = {ERROR: str(error), EXIT_CODE: error.exit_code}
        print(json.dumps(answer), file=answers, flush=True)


def _listen(questions: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        questions.put(line)
    os._exit(0)  # the process that asks has ended, or was killed: nobody would read the answer


if __name__ == "__main__":
    main(*sys.argv[1:])
