"""What the branches of one run have in common, and the states that they start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpcompile.core.config import ModelConfig, PretrainedConfig, TrainConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.core.stage_progress import StageProgress
from cpcompile.core.types import Progress
from cpcompile.frontend.checkpoint import load_plain, make_model, save_atomically
from cpcompile.models.language_model import LanguageModel
from cpcompile.partitioning.pretrained import PretrainedDecoder
from cpcompile.partitioning.recover import recover_least_squares
from cpcompile.text.corpus import Corpus
from cpcompile.training.branch import Branch, BranchState, Observer, held_out_perplexity, importance_batches
from cpcompile.training.importance import Importance, measure_importance, stack_contexts


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
        """Train a branch, by default over the steps after the dense phase."""
        settings = {"first": self.config.dense_steps, "last": self.config.steps} | settings
        branch = Branch(name=name, state=state, progress=self.progress, **settings)
        return branch.train(self.corpus, self.config, self.folder, self.observer)

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
        """A copy of the parent with gates at `selection`, or all at 1; with `one_for_all` the contexts share them."""
        model = make_model(self.model_config, contexts=1 if one_for_all else len(self.corpus.contexts))
        model.load_state_dict(parent.model.state_dict(), strict=False)
        if selection is not None:
            model.select(selection)
        return BranchState(model=model, moments=parent.moments, selection=selection, importance=importance)

    def importance(self, model: LanguageModel) -> Importance:
        """Importance of every unit for every context, with the gates of `model`, the dense parent, all at 1."""
        path = self.folder / "importance.pt"
        if path.exists():
            plain = load_plain(path)
            return {UnitKind(kind): table.numpy() for kind, table in plain.items()}
        batches = {c: importance_batches(self.corpus, self.config, c, salt=0) for c in self.corpus.contexts}
        report, leading = StageProgress(self.progress), len(self.corpus.leading)
        report.stage("importance", sum(map(len, batches.values())))
        importance = stack_contexts(
            [measure_importance(model, report.each(own), None, leading=leading) for own in batches.values()]
        )
        save_atomically({kind.value: torch.from_numpy(table) for kind, table in importance.items()}, path)
        return importance

    def recover(self, model: LanguageModel, selection: Selection) -> None:
        """Fit the weights of `model` to what `selection` leaves, on training text of all contexts."""
        if not isinstance(model, PretrainedDecoder):
            raise UsageError("train.recover: least squares are for pretrained models; one from scratch is trained")
        config, contexts = self.config, self.corpus.contexts
        draw = {"step": 0, "sequences": config.recover_sequences, "length": config.sequence, "seed": config.seed + 1}
        windows = [torch.from_numpy(self.corpus.batch(context, **draw)) for context in contexts]
        of_sequence = [context for context in contexts for _ in range(config.recover_sequences)]
        inputs = (torch.cat(windows)[:, :-1],)
        fitted = partial(self.progress, "least squares")
        recover_least_squares(model.partitioned, inputs, of_sequence, selection, progress=fitted)

    def perplexities(
        self, name: str, state: BranchState, swaps: Sequence[Mapping[str, str] | None] = (None,)
    ) -> list[dict[str, float]]:
        """Held-out perplexity per context, for each of `swaps`: with the units of other contexts, or its own (None)."""
        tokens, length = self.config.held_out_tokens, self.config.sequence
        windows = sum(len(self.corpus.held_out_windows(c, length=length, tokens=tokens)) for c in self.corpus.contexts)
        report = StageProgress(self.progress)
        report.stage(f"evaluate {name}", len(swaps) * windows)
        return [
            held_out_perplexity(state, self.corpus, self.config, tokens=tokens, swap=swap, measured=report.add)
            for swap in swaps
        ]
