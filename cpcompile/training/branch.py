"""One branch of a run: a model trained over a range of steps of the common schedule.

    for step:  for context:  loss(one batch of that context, with only its units) -> backward
               finite? -> clip -> AdamW -> recalibrate now and then -> snapshot now and then

A branch can be stopped after any step and resumes from its last snapshot to the same result:
batches and targets are pure functions of the step, and a snapshot holds everything else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.core.config import TrainConfig
from cpcompile.core.errors import CpcompileError
from cpcompile.core.selection import Selection
from cpcompile.core.stage_progress import StageProgress
from cpcompile.core.types import Progress
from cpcompile.frontend.checkpoint import load_plain, save_atomically
from cpcompile.models.language_model import Kept, LanguageModel
from cpcompile.text.corpus import Corpus
from cpcompile.training.allocation import can_swap, swap_units
from cpcompile.training.importance import Importance, measure_importance, moving_average, scored, stack_contexts
from cpcompile.training.teacher import Targets, Teacher, divergence


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a branch tells its observer after each step."""

    branch: str
    step: int
    first: int
    last: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    perplexity: Mapping[str, float] | None = None
    """Held-out perplexity per context, now and then."""


Observer = Callable[[StepReport], None]
EVALUATION_TOKENS = 2048
"""Held-out tokens per context of the perplexities during training; those at the end are of `held_out_tokens`."""
DIVERGED = 100.0
"""Nats per token above which a perplexity is meaningless: chance is the logarithm of the vocabulary, about 10."""
Moments = dict[str, dict[str, Tensor]]
"""AdamW's state by parameter name."""


@dataclass(kw_only=True)
class BranchState:
    """A model and its optimiser at the end of a branch, where other branches may start."""

    model: LanguageModel
    moments: Moments
    selection: Selection | None = None
    importance: Importance | None = None
    tokens_per_second: float = 0.0
    """Median over the steps of this branch."""


@dataclass(kw_only=True)
class Branch:
    """What to train: `state` from step `first` to `last`.

    With a selection only its units are computed; with a teacher the loss is
    (1 - distill) * cross-entropy + distill * KL; `recalibrate` lets the selection move.
    """

    name: str
    state: BranchState
    first: int
    last: int
    teacher: Teacher | None = None
    recalibrate: bool = False
    progress: Progress | None = None
    """Told of recalibrations; of steps the observer is."""

    def train(self, corpus: Corpus, config: TrainConfig, folder: Path, observer: Observer | None = None) -> BranchState:
        """Train to the end, resuming from a snapshot in `folder`; a finished branch is only read."""
        if self.first == self.last:
            return self.state
        finished, snapshot = folder / f"{self.name}.pt", folder / f"{self.name}.snapshot.pt"
        if finished.exists():
            self._restore(load_plain(finished))
            return self.state
        step = self._restore(load_plain(snapshot)) if snapshot.exists() else self.first
        optimizer = make_optimizer(self.state.model, self.state.moments, config)
        contexts = range(len(corpus.contexts))
        kept = self._kept(contexts)
        speeds: list[float] = []
        saved = time.monotonic()
        self.state.model.train()
        while step < self.last:
            started = time.perf_counter()
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = []
            for context in contexts:
                losses.append(self._backward(corpus, config, step, context, kept[context]))
            self._leave_removed_units_alone()
            self._refuse_non_finite(step, losses, config, folder)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            speeds.append(len(contexts) * config.batch * config.sequence / (time.perf_counter() - started))
            if fraction := self._swap_fraction(step, config):
                self._recalibrate(corpus, config, optimizer, step, fraction)
                kept = self._kept(contexts)
            if observer:
                perplexity = None
                if step == self.last or (step - self.first) % max(1, (self.last - self.first) // 8) == 0:
                    perplexity = held_out_perplexity(self.state, corpus, config, tokens=EVALUATION_TOKENS)
                observer(
                    StepReport(
                        branch=self.name,
                        step=step,
                        first=self.first,
                        last=self.last,
                        loss=sum(losses) / len(losses),
                        learning_rate=rate,
                        tokens_per_second=speeds[-1],
                        perplexity=perplexity,
                    )
                )
            if time.monotonic() - saved > config.snapshot_seconds and step < self.last:
                self._save(snapshot, optimizer, step)
                saved = time.monotonic()
        self.state.tokens_per_second = sorted(speeds)[len(speeds) // 2] if speeds else 0.0
        self._save(finished, optimizer, step)
        snapshot.unlink(missing_ok=True)
        return self.state

    def _backward(self, corpus: Corpus, config: TrainConfig, step: int, context: int, kept: Kept | None) -> float:
        """Add the gradient of a context's loss to those of the other contexts; returns the loss."""
        name = corpus.contexts[context]
        windows = torch.from_numpy(
            corpus.batch(name, step=step, sequences=config.batch, length=config.sequence, seed=config.seed)
        )
        targets = None
        if self.teacher is not None and step in self.teacher.steps:
            targets = self.teacher.targets(step, context, windows[:, :-1])
        mean, first, leading = 0.0, 0, len(corpus.leading)
        for piece in self.state.model.pieces(windows):
            last = first + piece[:, 1:].numel()
            own = (targets[0][first:last], targets[1][first:last]) if targets else None
            loss = self._loss(piece, leading, config, context, kept, own) * (len(piece) / len(windows))
            torch.autograd.backward(loss / len(corpus.contexts))
            mean, first = mean + loss.item(), last
        return mean

    def _loss(
        self,
        windows: Tensor,
        leading: int,
        config: TrainConfig,
        context: int,
        kept: Kept | None,
        targets: Targets | None,
    ) -> Tensor:
        inputs = windows[:, :-1]
        logits, labels = scored(
            self.state.model(inputs, self.state.model.gate_row(context), kept=kept), windows, leading
        )
        if targets is None:
            return F.cross_entropy(logits, labels)
        log_probabilities = logits.log_softmax(-1)
        cross_entropy = F.nll_loss(log_probabilities, labels)
        ids, values = (every.view(*inputs.shape, -1)[:, leading:].flatten(0, 1) for every in targets)
        return (1 - config.distill) * cross_entropy + config.distill * divergence(log_probabilities, ids, values)

    def _leave_removed_units_alone(self) -> None:
        """Clear the gradients of closed gates: where all units are computed, they would open the gates again."""
        for table in self.state.model.gate_tables().values():
            if table.grad is not None:
                table.grad[table == 0] = 0.0

    def _refuse_non_finite(self, step: int, losses: Sequence[float], config: TrainConfig, folder: Path) -> None:
        norm = nn.utils.clip_grad_norm_(self.state.model.parameters(), config.clip)
        if not (math.isfinite(norm) and all(map(math.isfinite, losses))):
            raise CpcompileError(
                f"{self.name}: the loss or its gradient is not finite at step {step} "
                f"(losses {losses}, gradient norm {float(norm)}); the update was not made. "
                f"Try a lower learning rate than {config.learning_rate} or a longer warm-up than "
                f"{config.warmup_fraction:.0%} of the steps: delete {folder} and start again"
            )

    def _kept(self, contexts: range) -> Sequence[Kept | None]:
        selection, model = self.state.selection, self.state.model
        if selection is None:
            return [None for _ in contexts]
        return [model.kept(selection, context) for context in selection.contexts]

    def _swap_fraction(self, step: int, config: TrainConfig) -> float:
        """The part of its own units that a context may swap after `step`; 0 where nothing could change."""
        if not self.recalibrate or self.state.selection is None or not can_swap(self.state.selection):
            return 0.0
        return swap_fraction(step - self.first, self.last - self.first, config)

    def _recalibrate(
        self, corpus: Corpus, config: TrainConfig, optimizer: torch.optim.Optimizer, step: int, fraction: float
    ) -> None:
        """Measure importance at the model's present state, swap units, and reset the moments of closed gates."""
        state = self.state
        assert state.selection is not None and state.importance is not None
        batches = [importance_batches(corpus, config, context, salt=step) for context in corpus.contexts]
        report = StageProgress(self.progress)
        report.stage("recalibration", sum(map(len, batches)))
        fresh = stack_contexts(
            [
                measure_importance(state.model, report.each(own), index, leading=len(corpus.leading))
                for index, own in enumerate(batches)
            ]
        )
        state.importance = moving_average(state.importance, fresh, 0.5)
        state.selection, swaps = swap_units(state.selection, state.importance, fraction=fraction, floor=config.floor)
        if swaps:
            state.model.select(state.selection)
            for table in state.model.gate_tables().values():
                if table in optimizer.state:
                    for moment in ("exp_avg", "exp_avg_sq"):
                        optimizer.state[table][moment][table == 0] = 0.0

    def _save(self, path: Path, optimizer: torch.optim.Optimizer, step: int) -> None:
        self.state.moments = moments_of(self.state.model, optimizer)
        importance = self.state.importance
        save_atomically(
            {
                "step": step,
                "model": self.state.model.state_dict(),
                "moments": self.state.moments,
                "selection": self.state.selection.to_plain() if self.state.selection else None,
                "importance": {k.value: torch.from_numpy(v) for k, v in importance.items()} if importance else None,
                "tokens_per_second": self.state.tokens_per_second,
            },
            path,
        )

    def _restore(self, plain: dict[str, Any]) -> int:
        state = self.state
        state.model.load_state_dict(plain["model"])
        state.moments = plain["moments"]
        state.selection = Selection.from_plain(plain["selection"]) if plain["selection"] else None
        if plain["importance"]:
            assert state.importance is not None
            state.importance = {kind: plain["importance"][kind.value].numpy() for kind in state.importance}
        state.tokens_per_second = plain["tokens_per_second"]
        step: int = plain["step"]
        return step


def learning_rate(step: int, config: TrainConfig) -> float:
    """Warm-up, stable, decay (arXiv 2404.06395): linear up, constant, linear down to a hundredth."""
    warmup = max(1, round(config.steps * config.warmup_fraction))
    decay = max(1, round(config.steps * config.decay_fraction))
    up = (step + 1) / warmup
    down = max(0.01, (config.steps - step) / decay)
    return config.learning_rate * min(1.0, up, down)


def swap_fraction(done: int, total: int, config: TrainConfig) -> float:
    """Part of its own units that a context may swap after `done` of `total` steps; 0 between recalibrations."""
    until = total * config.recalibrate_until
    every = max(1, round(until / (config.recalibrations + 1)))
    if not config.recalibrations or done % every or done >= until:
        return 0.0
    return config.swap_fraction * (1 - done / until)


def make_optimizer(model: LanguageModel, moments: Moments, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with its state restored by name; matrices decay, norms and gates do not."""
    gates = model.gate_tables()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n not in gates]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or n in gates]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    for name, parameter in model.named_parameters():
        if name in moments:
            optimizer.state[parameter] = {key: value.clone() for key, value in moments[name].items()}
    return optimizer


def moments_of(model: LanguageModel, optimizer: torch.optim.Optimizer) -> Moments:
    """AdamW's state by parameter name."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def importance_batches(corpus: Corpus, config: TrainConfig, context: str, *, salt: int) -> list[Tensor]:
    """Training windows to measure importance on; `salt` draws others."""
    batches = max(1, config.importance_sequences // config.batch)
    return [
        torch.from_numpy(
            corpus.batch(
                context,
                step=(salt + 1) * 1_000_003 + batch,
                sequences=min(config.batch, config.importance_sequences),
                length=config.sequence,
                seed=config.seed,
            )
        )
        for batch in range(batches)
    ]


def held_out_perplexity(
    state: BranchState,
    corpus: Corpus,
    config: TrainConfig,
    *,
    tokens: int,
    swap: Mapping[str, str] | None = None,
    measured: Callable[[int], None] = lambda _windows: None,
) -> dict[str, float]:
    """Perplexity per context on its held-out windows; `swap` evaluates a context with another's units.

    measured: called after each pass with the number of its windows.
    """
    result = {}
    model, leading = state.model.eval(), len(corpus.leading)
    with torch.no_grad():
        for context in corpus.contexts:
            units_of = swap[context] if swap else context
            kept = model.kept(state.selection, units_of) if state.selection else None
            index = model.gate_row(corpus.contexts.index(units_of))
            windows = torch.from_numpy(corpus.held_out_windows(context, length=config.sequence, tokens=tokens))
            total = 0.0
            for part in (piece for some in torch.split(windows, 16) for piece in model.pieces(some)):
                logits = model(part[:, :-1], index, kept=kept)
                total += F.cross_entropy(*scored(logits, part, leading), reduction="sum").item()
                measured(len(part))
            loss = total / windows[:, leading + 1 :].numel()
            if not loss < DIVERGED:
                raise CpcompileError(
                    f"{context}: the held-out loss is {loss:.3g} per token: training has diverged; "
                    f"try a lower learning rate than {config.learning_rate}"
                )
            result[context] = math.exp(loss)
    model.train()
    return result
