"""`cpcompile train`: from a corpus to `model.pt` and `model.dense.pt`.

    parent ──┬── dense baseline ── teacher
             ├── importance ── allocation ── partition (masked, distilled, recalibrated)
             └── controls

All branches follow one warm-up / stable / decay schedule, part at the same step and meet the
same tokens in the same order. Contextual Partitioning: arXiv 2501.12901; what is measured and
decided differently here stands in `allocation.py` and the benchmarks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import cpcompile
from cpcompile.core.config import ModelConfig, PretrainedConfig, TrainConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.selection import BoolArray, Selection, UnitKind
from cpcompile.core.types import Progress
from cpcompile.files.whole_files import only_process, require_file_path, whole_file
from cpcompile.frontend.checkpoint import (
    Checkpoint,
    dense_path,
    load_checkpoint,
    load_plain,
    make_model,
    save_atomically,
    save_checkpoint,
)
from cpcompile.models.language_model import LanguageModel
from cpcompile.partitioning.pretrained import PretrainedDecoder
from cpcompile.partitioning.recover import recover_least_squares
from cpcompile.text.corpus import Corpus
from cpcompile.training.allocation import Scores, allocate, allocate_one_for_all, allocate_random, kept_units
from cpcompile.training.branch import (
    Branch,
    BranchState,
    Observer,
    held_out_perplexity,
    importance_batches,
)
from cpcompile.training.importance import Importance, measure_importance, stack_contexts
from cpcompile.training.teacher import Teacher

CONTROL_MEANING: Mapping[str, str] = {
    "one-mask": "one selection and one gate scale for all contexts at the same budget, trained like the "
    "partitioned model: what pruning gives",
    "importance-only": "the partitioned model's first selection on the dense baseline, without training",
    "random-one": "one random selection and one gate scale for all contexts, trained like the partitioned model",
    "random-per-context": "a random selection per context, trained like the partitioned model",
    "small-dense": "a dense model of the active size from scratch, same tokens and schedule",
    "small-dense-distilled": "a dense model of the active size from scratch, distilled like the partitioned model",
    "dense-distilled": "the dense parent trained on whole, distilled like the partitioned model",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything the branches of one run have in common, and the folder that makes it resumable."""

    corpus: Corpus
    model_config: ModelConfig | PretrainedConfig
    config: TrainConfig
    folder: Path
    pretrained: Mapping[str, Tensor] | None
    observer: Observer | None
    progress: Progress

    def branch(self, name: str, state: BranchState, **settings: Any) -> BranchState:
        """Train a branch from the parting of the ways to the end, unless told otherwise."""
        settings = {"first": self.config.dense_steps, "last": self.config.steps} | settings
        return Branch(name=name, state=state, **settings).train(self.corpus, self.config, self.folder, self.observer)

    def fresh(self) -> BranchState:
        """An untrained dense model, the same for the same seed; or the pretrained one."""
        torch.manual_seed(self.config.seed)
        model = make_model(self.model_config)
        if self.pretrained is not None:
            model.load_state_dict(dict(self.pretrained))
        return BranchState(model=model, moments={})

    def dense(self, parent: BranchState) -> BranchState:
        """A copy of the parent to train on whole."""
        model = make_model(self.model_config)
        model.load_state_dict(parent.model.state_dict())
        return BranchState(model=model, moments=parent.moments)

    def gated(
        self,
        parent: BranchState,
        selection: Selection | None = None,
        importance: Importance | None = None,
        *,
        one_for_all: bool = False,
    ) -> BranchState:
        """A copy of the parent with gates at `selection`, or all at 1; contexts share them if it is `one_for_all`."""
        model = make_model(self.model_config, contexts=1 if one_for_all else len(self.corpus.contexts))
        model.load_state_dict(parent.model.state_dict(), strict=False)
        if selection is not None:
            model.select(selection)
        return BranchState(model=model, moments=parent.moments, selection=selection, importance=importance)

    def importance(self, model: LanguageModel) -> Importance:
        """Importance of every unit of the dense parent for every context: with the gates of `model` all at 1."""
        path = self.folder / "importance.pt"
        if path.exists():
            plain = load_plain(path)
            return {UnitKind(kind): table.numpy() for kind, table in plain.items()}
        contexts = self.corpus.contexts
        measured = []
        for done, context in enumerate(contexts):
            self.progress("importance", done, len(contexts))
            batches = importance_batches(self.corpus, self.config, context, salt=0)
            measured.append(measure_importance(model, batches, None))
        self.progress("importance", len(contexts), len(contexts))
        importance = stack_contexts(measured)
        save_atomically({kind.value: torch.from_numpy(table) for kind, table in importance.items()}, path)
        return importance

    def recover(self, model: LanguageModel, selection: Selection) -> None:
        """Fit the weights of `model` to what `selection` leaves, on training text of all contexts."""
        if not isinstance(model, PretrainedDecoder):
            raise UsageError("train.recover: least squares are for pretrained models; one from scratch is trained")
        self.progress("least squares", 0, 1)
        config, contexts = self.config, self.corpus.contexts
        draw = {"step": 0, "sequences": config.recover_sequences, "length": config.sequence, "seed": config.seed + 1}
        windows = [torch.from_numpy(self.corpus.batch(context, **draw)) for context in contexts]
        of_sequence = [context for context in contexts for _ in range(config.recover_sequences)]
        recover_least_squares(model.partitioned, (torch.cat(windows)[:, :-1],), of_sequence, selection)
        self.progress("least squares", 1, 1)

    def perplexity(self, state: BranchState, swap: Mapping[str, str] | None = None) -> dict[str, float]:
        """Held-out perplexity per context."""
        return held_out_perplexity(state, self.corpus, self.config, tokens=self.config.held_out_tokens, swap=swap)


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
    identity = _identity(corpus, model_config, config, pretrained)
    with _work_folder(out, identity, resume=resume) as folder:
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
    importance = run.importance(partition.model)
    budgets = {kind: budget for kind, budget in budgets.items() if kind in importance}
    selection = allocate(
        corpus.contexts,
        importance,
        budgets,
        core_fractions=cores,
        specificity=config.specificity,
        floor=config.floor,
    )
    teacher = None
    if config.steps > config.dense_steps:
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

    controls = {
        name: _train_control(name, run, parent, baseline, selection, importance, budgets, teacher)
        for name in config.controls
    }
    run.progress("evaluation", 0, 1 + len(corpus.contexts))
    perplexity = {"dense-baseline": run.perplexity(baseline), "partition": run.perplexity(partition)}
    training = {
        "run": _digest(identity),
        "settings": _plain(config),
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
            name: {"description": CONTROL_MEANING[name], "perplexity": perplexity}
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
    for name in config.controls:
        if name != "importance-only":
            planned[name] = config.steps if name.startswith("small-dense") else after
    return planned


def work_path(out: Path) -> Path:
    """Where a run that has not ended yet keeps its state."""
    return out.with_name(f"{out.name}.work")


def swap_matrix(run: Run, state: BranchState, own: Mapping[str, float]) -> dict[str, Any]:
    """Perplexity of context i (row) with the units of context j (column); with its `own` on the diagonal."""
    contexts = run.corpus.contexts
    count = len(contexts)
    matrix = [[own[context] for _ in contexts] for context in contexts]
    for shift in range(1, count):
        run.progress("evaluation", 1 + shift, 1 + count)
        units_of = {context: contexts[(row + shift) % count] for row, context in enumerate(contexts)}
        swapped = run.perplexity(state, swap=units_of)
        for row, context in enumerate(contexts):
            matrix[row][(row + shift) % count] = swapped[context]
    run.progress("evaluation", 1 + count, 1 + count)
    return {"contexts": list(contexts), "perplexity": matrix}


def _train_control(
    name: str,
    run: Run,
    parent: BranchState,
    baseline: BranchState,
    selection: Selection,
    importance: Importance,
    budgets: Mapping[UnitKind, float],
    teacher: Teacher | None,
) -> dict[str, float]:
    """Train the control `name` and return its held-out perplexity per context."""
    contexts, config = run.corpus.contexts, run.config
    if name == "importance-only":
        return run.perplexity(run.gated(baseline, selection, importance))
    if name == "dense-distilled":
        return run.perplexity(run.branch(name, run.dense(parent), teacher=teacher))
    if name in ("small-dense", "small-dense-distilled"):
        # The first units of every layer, for every context, from scratch and without gates: a smaller dense model.
        small = run.fresh()
        small.selection = Selection(contexts, {k: _first_units(importance[k], b) for k, b in budgets.items()})
        distilled = teacher if name == "small-dense-distilled" else None
        return run.perplexity(run.branch(name, small, first=0, teacher=distilled))
    if name == "one-mask":
        chosen = allocate_one_for_all(contexts, importance, budgets, floor=config.floor)
    else:
        chosen = allocate_random(
            contexts, importance, budgets, seed=config.seed, floor=config.floor, one_for_all=name == "random-one"
        )
    state = run.gated(parent, chosen, importance, one_for_all=name in ("one-mask", "random-one"))
    return run.perplexity(run.branch(name, state, teacher=teacher))


def _first_units(importance: Scores, budget: float) -> BoolArray:
    layers = importance.shape[1]
    kept = np.zeros(importance.shape, dtype=np.bool_)
    kept[:, :, : max(1, round(kept_units(importance.shape, budget) / layers))] = True
    return kept


def _held_out_sample(corpus: Corpus, config: TrainConfig) -> dict[str, npt.NDArray[np.int32]]:
    return {
        context: np.asarray(corpus.held_out[context].ids[: config.held_out_tokens + 1], dtype=np.int32)
        for context in corpus.contexts
    }


def _plain(config: TrainConfig) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return settings


def require_outputs(out: Path) -> None:
    """UsageError unless `train` should write `out` and its dense baseline: nothing is there, or checkpoints are."""
    for path in (out, dense_path(require_file_path(out))):
        if require_file_path(path).exists():
            try:
                load_checkpoint(path)
            except UsageError as error:
                raise UsageError(f"{error}. It stays as it is: choose another --out, or remove it") from error


def _identity(
    corpus: Corpus,
    model_config: ModelConfig | PretrainedConfig,
    config: TrainConfig,
    pretrained: Mapping[str, Tensor] | None,
) -> dict[str, Any]:
    """What decides the outcome of a run, in plain containers."""
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "model": dataclasses.asdict(model_config),
                "train": {k: v for k, v in _plain(config).items() if k not in ("snapshot_seconds", "controls")},
                "data": dict(corpus.digests),
                "tokenizer": _digest(corpus.tokenizer),
                "pretrained": _digest_of_weights(pretrained) if pretrained is not None else None,
                "versions": {"cpcompile": cpcompile.__version__, "torch": torch.__version__},
                "threads": torch.get_num_threads(),
            }
        )
    )
    return plain


def _digest(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _digest_of_weights(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def _work_folder(out: Path, identity: Mapping[str, Any], *, resume: bool) -> Iterator[Path]:
    """The run's folder: new, or that of the interrupted run with the same settings and data; removed at the end."""
    folder = work_path(out)
    if resume and not folder.exists():
        raise UsageError(f"{folder}: there is no interrupted run to go on with; leave --resume out")
    with only_process(folder / "lock", f"{folder}: another process is training there; wait for it, or stop it"):
        record = folder / "run.json"
        if any(path.name != "lock" for path in folder.iterdir()):
            if not resume:
                raise UsageError(
                    f"{folder}: an interrupted run is there; go on with --resume, or delete that folder to start anew"
                )
            _require_same(record, identity)
        else:
            with whole_file(record) as temporary:
                temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        yield folder
    shutil.rmtree(folder)


def _require_same(record: Path, identity: Mapping[str, Any]) -> None:
    """The run that wrote `record` had the same settings and data."""
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [
            f"{group} {name}: {then.get(name)!s:.60} then, {now.get(name)!s:.60} now".strip()
            for group, now, then in ((key, _table(identity[key]), _table(before.get(key))) for key in identity)
            for name in sorted(now.keys() | then.keys())
            if now.get(name) != then.get(name)
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{record}: cannot be read ({error}); delete {record.parent} to start anew") from error
    if changed:
        raise UsageError(
            f"{record.parent}: the interrupted run had other settings ({'; '.join(changed)}); "
            "resume with the same ones, or delete the folder to start anew"
        )


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"": value}
