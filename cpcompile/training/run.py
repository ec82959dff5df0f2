"""What the branches of one run have in common, and the states that they start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpcompile.core.config import ModelConfig, PretrainedConfig, TrainConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Selection, UnitKind
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
        contexts = self.corpus.contexts
        measured = []
        for done, context in enumerate(contexts):
            self.progress("importance", done, len(contexts))
            batches = importance_batches(self.corpus, self.config, context, salt=0)
            measured.append(measure_importance(model, batches, None, leading=len(self.corpus.leading)))
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
