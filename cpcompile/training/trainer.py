"""`cpcompile train`: from a corpus to `model.pt` and `model.dense.pt`.

    parent ──┬── dense baseline ── teacher
             ├── importance ── allocation ── partition (masked, distilled, recalibrated)
             └── controls

All branches follow one warm-up / stable / decay schedule, part at the same step and meet the
same tokens in the same order. Contextual Partitioning: arXiv 2501.12901; what is measured and
decided differently here is explained in `allocation.py` and the benchmarks.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cpcompile.core.config import ModelConfig, PretrainedConfig, TrainConfig
from cpcompile.core.controls import CONTROLS
from cpcompile.core.errors import UsageError
from cpcompile.core.paths import dense_path
from cpcompile.core.selection import UnitKind
from cpcompile.core.types import Progress
from cpcompile.files.whole_files import require_file_path
from cpcompile.frontend.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cpcompile.text.corpus import Corpus
from cpcompile.training.allocation import allocate, keeps_all
from cpcompile.training.branch import BranchState, Observer
from cpcompile.training.controls import ControlTrainer
from cpcompile.training.importance import equal_importance
from cpcompile.training.run import Run
from cpcompile.training.teacher import Teacher
from cpcompile.training.work_folder import digest_of, plain_settings, run_identity, work_folder

MOST_SWAPPED = 8
"""Contexts up to which all pairs of text and units are measured."""


def train(
    corpus: Corpus,
    model_config: ModelConfig | PretrainedConfig,
    config: TrainConfig,
    out: Path,
    *,
    pretrained: Mapping[str, Tensor] | None = None,
    resume: bool = False,
    held_out: bool = True,
    observer: Observer | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Train all branches and write `out` and `<out>.dense.pt`; an interrupted run goes on with `resume`.

    pretrained: the state that the parent starts with, instead of a random one.
    """
    identity = run_identity(corpus, model_config, config, pretrained)
    with work_folder(work_path(out), identity, resume=resume) as folder:
        run = Run(
            corpus=corpus,
            model_config=model_config,
            config=config,
            folder=folder,
            pretrained=pretrained,
            observer=observer,
            progress=progress or (lambda _stage, _done, _total: None),
        )
        return _train(run, out, identity, held_out=held_out)


def _train(run: Run, out: Path, identity: Mapping[str, Any], *, held_out: bool) -> Checkpoint:
    corpus, config = run.corpus, run.config
    budgets = {UnitKind(kind): budget for kind, budget in config.budgets.items()}
    cores = {UnitKind(kind): fraction for kind, fraction in config.core_fractions.items()}

    parent = run.branch("parent", run.fresh(), first=0, last=config.dense_steps)
    baseline = run.branch("dense-baseline", run.dense(parent))
    partition = run.gated(parent)
    units = {own.kind: own for own in partition.model.units()}
    budgets = {kind: budget for kind, budget in budgets.items() if kind in units}
    if all(keeps_all(units[kind], budget) for kind, budget in budgets.items()):
        importance = equal_importance(units.values(), len(corpus.contexts))
    else:
        importance = run.importance(partition.model)
    selection = allocate(
        corpus.contexts,
        importance,
        budgets,
        core_fractions=cores,
        specificity=config.specificity,
        floor=config.floor,
    )
    teacher = None
    if config.steps > config.dense_steps and config.distill > 0:
        teacher = Teacher(
            baseline.model.eval(),
            run.folder / "teacher",
            steps=range(config.dense_steps, config.steps),
            contexts=len(corpus.contexts),
            tokens=config.batch * config.sequence,
            top=config.teacher_top,
        )
    partition.model.select(selection)
    partition.selection, partition.importance = selection, importance
    if config.recover == "least-squares":
        run.recover(partition.model, selection)
    partition = run.branch("partition", partition, teacher=teacher, recalibrate=True)

    trainer = ControlTrainer(
        run=run,
        parent=parent,
        baseline=baseline,
        selection=selection,
        importance=importance,
        budgets=budgets,
        teacher=teacher,
    )
    controls = {name: trainer.perplexity(CONTROLS[name]) for name in config.controls}
    perplexity = {
        name: run.perplexities(name, state)[0]
        for name, state in (("dense-baseline", baseline), ("partition", partition))
    }
    training = {
        "run": digest_of(identity),
        "settings": plain_settings(config),
        "seed": config.seed,
        "data_digests": dict(corpus.digests),
        "versions": identity["versions"] | {"python": platform.python_version()},
        "threads": identity["threads"],
        "tokens": config.steps * len(corpus.contexts) * config.batch * config.sequence,
        "tokens_per_second": {
            "dense": baseline.tokens_per_second,
            "partition": partition.tokens_per_second,
        },
        "perplexity": perplexity,
        "controls": {
            name: {"description": CONTROLS[name].meaning, "perplexity": perplexity}
            for name, perplexity in controls.items()
        },
        "swap_matrix": swap_matrix(run, partition, perplexity["partition"]),
    }
    shared: dict[str, Any] = {
        "config": run.model_config,
        "contexts": corpus.contexts,
        "tokenizer": corpus.tokenizer,
        "training": training,
        "held_out": _held_out_sample(corpus, config) if held_out else {},
    }
    assert partition.selection is not None
    by_partition = partition.model.sort_units(partition.selection)
    counts = {c: np.bincount(corpus.train[c].ids, minlength=run.model_config.vocabulary) for c in corpus.contexts}
    checkpoint = Checkpoint(state=partition.model.state_dict(), selection=by_partition, token_counts=counts, **shared)
    save_checkpoint(Checkpoint(state=baseline.model.state_dict(), **shared), dense_path(out))
    save_checkpoint(checkpoint, out)
    return checkpoint


def planned_steps(config: TrainConfig) -> dict[str, int]:
    """Steps of every branch that `train` trains, in order."""
    after = config.steps - config.dense_steps
    planned = {"parent": config.dense_steps, "dense-baseline": after, "partition": after}
    controls = [CONTROLS[name] for name in config.controls]
    planned |= {c.name: config.steps if c.from_scratch else after for c in controls if c.trained}
    return planned


def work_path(out: Path) -> Path:
    """The folder of a run that has not ended."""
    return out.with_name(f"{out.name}.work")


def swap_matrix(run: Run, state: BranchState, own: Mapping[str, float]) -> dict[str, Any] | None:
    """Perplexity of context i (row) with the units of context j (column); with its `own` on the diagonal.

    Above MOST_SWAPPED contexts each text is tried with the units of so many, at equal distances in the order of the
    contexts, and the rest is None: all pairs would cost more than the training. None if all contexts have the same
    units.
    """
    assert state.selection is not None
    if all((table == table[0]).all() for table in state.selection.kept.values()):
        return None
    contexts = run.corpus.contexts
    count = len(contexts)
    matrix: list[list[float | None]] = [
        [own[context] if row == column else None for column in range(count)] for row, context in enumerate(contexts)
    ]
    shifts = np.unique(np.linspace(1, count - 1, min(count, MOST_SWAPPED) - 1).round().astype(int)).tolist()
    swaps = [{context: contexts[(row + shift) % count] for row, context in enumerate(contexts)} for shift in shifts]
    for shift, swapped in zip(shifts, run.perplexities("swapped units", state, swaps), strict=True):
        for row, context in enumerate(contexts):
            matrix[row][(row + shift) % count] = swapped[context]
    return {"contexts": list(contexts), "perplexity": matrix}


def _held_out_sample(corpus: Corpus, config: TrainConfig) -> dict[str, npt.NDArray[np.int32]]:
    return {
        context: np.asarray(corpus.held_out[context].ids[: config.held_out_tokens + 1], dtype=np.int32)
        for context in corpus.contexts
    }


def require_outputs(out: Path) -> None:
    """UsageError unless `train` should write `out` and its dense baseline: nothing is there, or checkpoints are."""
    for path in (out, dense_path(require_file_path(out))):
        if require_file_path(path).exists():
            try:
                load_checkpoint(path)
            except UsageError as error:
                raise UsageError(f"{error}. It stays as it is: choose another --out, or remove it") from error
