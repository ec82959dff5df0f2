"""Contexts that are compared with the eager model in several processes, before timings need the machine for themselves.

    python -m cpcompile.pipeline.jobs BUNDLE MODEL CONFIG THREADS [DATA]

reads a context and names of its engines from each line of its input, and answers with their parity and quality.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

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
from cpcompile.validation.comparison import NOT_COMPARED, Compared, Comparison, compare_engine
from cpcompile.validation.reference import Reference
from cpcompile.validation.validator import STAGE

ERROR, EXIT_CODE = "error", "exit code"
"""In an answer, in place of engines."""


def compare_in_processes(
    bundle: Bundle,
    model: Path,
    config: ValidateConfig,
    *,
    data: Path | None,
    kept: Results = NO_RESULTS,
    progress: Progress,
) -> Compared:
    """The comparisons of all engines that run here, `config.jobs` contexts at a time; none if that is 1.

    kept: results of engines that are left out. CpcompileError: an engine cannot be loaded, or a process ended, for lack
    of memory perhaps.
    """
    contexts = {context: names for context in bundle.contexts if (names := _engines(bundle, context, kept))}
    jobs = min(config.jobs, len(contexts))
    if jobs < 2:
        return NOT_COMPARED
    threads = max(1, (config.threads or available_cores()) // jobs)
    found: dict[tuple[str, str], Comparison] = {}
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
                raise CpcompileError(f"{asked[future]}: {error}; fewer --jobs need less memory") from error
            found |= _compared(asked[future], answer)
            progress(stage, done, len(contexts))
    return found


def _engines(bundle: Bundle, context: str, kept: Results) -> list[str]:
    """The names of the engines of `context` that are compared."""
    known = {each.name for each in kept.get(context, ())}
    return [each.name for each in bundle.variants(context) if each.name not in known and why_not_here(each) is None]


def _compared(context: str, answer: Mapping[str, Any]) -> Compared:
    if ERROR in answer:
        raise (UsageError if answer[EXIT_CODE] == UsageError.exit_code else CpcompileError)(answer[ERROR])
    return {(context, name): from_json(Comparison, each) for name, each in answer.items()}


def _answer(line: str, bundle: Bundle, reference: Reference, config: ValidateConfig, threads: int) -> Any:
    """By the names of engines, what they compute beside the eager model."""
    context, names = json.loads(line)
    try:
        compared = {
            name: compare_engine(bundle, bundle.variant(context, name), reference, config, threads=threads)
            for name in names
        }
        return to_json(compared)
    except CpcompileError as error:
        return {ERROR: str(error), EXIT_CODE: error.exit_code}


def main(bundle: str, model: str, config: str, threads: str, data: str | None = None) -> None:
    """Answer until there are no more questions."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(threads))
    settings, opened = from_json(ValidateConfig, json.loads(config)), open_bundle(Path(bundle))
    text = Path(data) if data is not None else None
    reference = reference_of(opened, open_source(Path(model)), settings, data=text, progress=lambda *_: None)
    for line in sys.stdin:
        print(json.dumps(_answer(line, opened, reference, settings, int(threads))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
