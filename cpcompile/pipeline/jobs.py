"""Contexts compared with the eager model in several processes, before timings need the machine for themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cpcompile.bundle.reader import Bundle, open_bundle
from cpcompile.core.config import ValidateConfig
from cpcompile.core.json_form import from_json, to_json
from cpcompile.core.types import Progress
from cpcompile.frontend.source import open_source
from cpcompile.machine.environment import available_cores
from cpcompile.machine.subprocesses import ProcessFailedError, fresh_processes
from cpcompile.pipeline.references import reference_of, require_own_model
from cpcompile.report.results import NO_RESULTS, Results
from cpcompile.runtime.availability import why_not_here
from cpcompile.validation.comparison import NOT_COMPARED, Compared, EngineComparison, compare_engine
from cpcompile.validation.reference import Reference
from cpcompile.validation.validator import STAGE


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

    kept: results of engines that are left out. UsageError, CpcompileError: as `compare_engine` raises them.
    ProcessFailedError: a process could not answer.
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
    with ThreadPoolExecutor(jobs) as pool, fresh_processes(jobs, __name__, *map(str, arguments)) as ask:
        asked = {pool.submit(ask, question): question[0] for question in contexts.items()}
        for done, future in enumerate(as_completed(asked), start=1):
            context = asked[future]
            try:
                answers = future.result()
            except ProcessFailedError as error:
                raise ProcessFailedError(f"{context}: {error}; if memory ran out, fewer --jobs need less") from error
            found |= {(context, name): from_json(EngineComparison, each) for name, each in answers.items()}
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


def answer(
    question: Sequence[Any], bundle: str, model: str, config: str, threads: str, data: str = ""
) -> dict[str, Any]:
    """Parity and quality of engines, by their names, for `question`: a context, and the names."""
    context, names = question
    opened, reference, settings = _open(bundle, model, config, threads, data)
    return {
        name: to_json(compare_engine(opened, opened.variant(context, name), reference, settings, threads=int(threads)))
        for name in names
    }


@cache
def _open(bundle: str, model: str, config: str, threads: str, data: str) -> tuple[Bundle, Reference, ValidateConfig]:
    torch.set_num_threads(int(threads))
    settings, opened = from_json(ValidateConfig, json.loads(config)), open_bundle(Path(bundle))
    source = open_source(Path(model))
    require_own_model(opened, source)
    text = Path(data) if data else None
    return opened, reference_of(opened, source, settings, data=text, progress=lambda *_: None), settings
