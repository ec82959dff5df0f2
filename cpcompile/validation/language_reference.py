"""A trained language model as the reference of its engines: held-out text, and its dense baseline.

The engine of a context may have a trimmed vocabulary: its inputs and logits then use its own token ids, and the eager
model is called through the id map.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cpcompile.core.cache import INPUT, OUTPUT
from cpcompile.core.config import ValidateConfig
from cpcompile.core.measured import NotMeasured
from cpcompile.core.rounding import UNCALIBRATED, Calibration
from cpcompile.core.selection import UnitKind
from cpcompile.core.types import Array, Feeds, Steps, unwatched
from cpcompile.frontend.checkpoint import Checkpoint, load_checkpoint
from cpcompile.machine.memory import ProcessMemory, release_memory
from cpcompile.models.language_model import LanguageModel
from cpcompile.report.results import Quality
from cpcompile.text.tokenization import leading_tokens
from cpcompile.text.vocabulary import TrimmedVocabulary, reencode
from cpcompile.validation.coherence import NEW_TOKENS, PROMPT_TOKENS, measure_coherence
from cpcompile.validation.fisher import frozen_parameters
from cpcompile.validation.memory import measure_eager
from cpcompile.validation.quality import (
    BATCH,
    SHORT_TEXT,
    IntArray,
    Score,
    compare_quality,
    consecutive_windows,
    measure_score,
    window_losses,
)
from cpcompile.validation.reference import UNROUNDED, Outputs, Run, Schemes, Timed
from cpcompile.validation.rounded_model import Rounding

BATCHES_PER_SHAPE = 4
SEARCHED, OTHERS = slice(0, None, 2), slice(1, None, 2)
"""The windows of held-out text that a search sees, and those that it does not."""
NO_DENSE = "there is no dense baseline beside the model"
NO_TEXT = "there is no held-out text of this context"


@dataclass(frozen=True)
class _Text:
    """Held-out text of one context as its engine reads it."""

    ids: IntArray
    windows: IntArray
    leading: tuple[int, ...]
    """The ids with which every window starts."""
    token_ids: IntArray | None = None
    """The id of each of the engine's tokens in the whole vocabulary, if its own is trimmed."""
    ratio: float = 1.0
    """Tokens per token of the whole vocabulary."""

    def fill(self, *shape: int) -> IntArray:
        """Ids of that shape: sequences of `leading` and then the text, repeated if too short; 0 if there is none."""
        *rows, sequence = shape
        leading = np.asarray(self.leading[:sequence], dtype=np.int64)
        ids = self.ids if len(self.ids) else np.zeros(1, dtype=np.int64)
        text = np.resize(ids, (*rows, sequence - len(leading)))
        return np.concatenate([np.broadcast_to(leading, (*rows, len(leading))), text], axis=-1)


class LanguageReference:
    """The masked eager model of a checkpoint, and its dense baseline.

    `held_out` maps a context to token ids (1-D), cut into windows of `sequence` predictions for quality; `trimmed`
    names the contexts with a trimmed vocabulary; `calibration` is what engines round parameters to.
    """

    logits: str | None = OUTPUT
    no_inputs = NO_TEXT

    def __init__(
        self,
        checkpoint: Checkpoint,
        dense: Path | None,
        config: ValidateConfig,
        *,
        held_out: Mapping[str, npt.NDArray[Any]],
        sequence: int,
        trimmed: Mapping[str, TrimmedVocabulary] | None = None,
        calibration: Calibration = UNCALIBRATED,
    ) -> None:
        self.contexts = checkpoint.contexts
        self._single = checkpoint.model
        self._tokenizer = checkpoint.tokenizer
        self._dense = dense
        self._config = config
        self.calibration = calibration
        self.sequence = sequence
        self._held_out = {c: np.asarray(held_out.get(c, ()), dtype=np.int64) for c in self.contexts}
        self.digest = _digest(self._held_out)
        self._dense_scores: dict[str, Score | NotMeasured] = {}
        self._dense_memory: ProcessMemory | NotMeasured | None = None
        self._texts = {context: self._text(context, (trimmed or {}).get(context)) for context in self.contexts}

    def masked(self, context: str, schemes: Schemes = UNROUNDED, *, round_inputs: bool = True) -> Run:
        return self._run(self._single, context, schemes, round_inputs=round_inputs)

    def exact(self, context: str, schemes: Schemes = UNROUNDED) -> Run:
        """Takes twice the model's bytes while the function lives; the dense baseline is released meanwhile."""
        self.__dict__.pop("_dense_model", None)
        release_memory()
        return self._run(_in_float64(self._single), context, schemes)

    def dense(self, context: str) -> Run | NotMeasured:
        """It returns all logits, as for any user: selecting from them is not part of its cost."""
        return (
            self.as_engine(context, eager_run(self._dense_model), all_logits=True)
            if self._dense
            else NotMeasured(NO_DENSE)
        )

    def compiled(self, context: str) -> Run | NotMeasured:
        return (
            self.as_engine(context, eager_run(self._compiled), all_logits=True)
            if self._dense
            else NotMeasured(NO_DENSE)
        )

    def as_engine(self, context: str, run: Run, *, all_logits: bool = False) -> Run:
        return _of_tokens(run, self._texts[context].token_ids, all_logits=all_logits)

    def dense_memory(self, context: str, *, threads: int) -> ProcessMemory | NotMeasured:
        if self._dense is None:
            return NotMeasured(NO_DENSE)
        if self._dense_memory is None:  # the same for all contexts
            feeds = {INPUT: np.zeros(self._config.speed_shapes[0], dtype=np.int64)}
            self._dense_memory = measure_eager(self._dense, feeds, threads=threads)
        return self._dense_memory

    def inputs(self, context: str) -> Iterator[Feeds]:
        """Each shape is filled BATCHES_PER_SHAPE times from the start of the text, which is repeated if too short."""
        text = self._texts[context]
        for batch, sequence in self._config.shapes if len(text.ids) else ():
            for filled in text.fill(BATCHES_PER_SHAPE, batch, sequence):
                yield {INPUT: filled}

    def timed(self, context: str) -> Sequence[Timed]:
        text = self._texts[context]
        return [Timed(*shape, {INPUT: text.fill(*shape)}) for shape in self._config.speed_shapes]

    def quality(self, context: str, engine: Run | NotMeasured, *, steps: Steps = unwatched) -> Quality:
        text = self._texts[context]
        own = 0 if isinstance(engine, NotMeasured) else self._runs_of_score(text)
        known = context in self._dense_scores or self._dense is None
        total, done = own + (0 if known else self._runs_of_score(self._whole_text(context))), 0
        steps(done, total)

        def counted(run: Run) -> Run:
            def counting(feeds: Feeds) -> Outputs:
                nonlocal done
                outputs = run(feeds)
                done += 1
                steps(done, total)
                return outputs

            return counting

        score = engine if isinstance(engine, NotMeasured) else self._score(counted(engine), text)
        return compare_quality(score, self._dense_score(context, counted))

    def windows(self, context: str) -> int:
        """How many windows the held-out text of `context` has, as its engine reads it."""
        return len(self._texts[context].windows)

    def sample(self, context: str, sequences: int, length: int) -> Feeds:
        """At most so many `sequences` of `length` tokens, of the half of the text that is searched, as one batch."""
        text = self._texts[context]
        ids = text.windows[SEARCHED][:, len(text.leading) : -1].reshape(-1)
        return {INPUT: consecutive_windows(ids, length, text.leading)[:sequences, :-1]}

    @contextmanager
    def differentiable(self, context: str) -> Iterator[tuple[LanguageModel, Callable[[torch.Tensor], torch.Tensor]]]:
        """The eager model, whose parameters are frozen, and its logits as a function of the engine's token ids."""
        model, kept = self._single, self._texts[context].token_ids
        index = torch.tensor(self.contexts.index(context)) if model.contexts else None

        def logits(ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = model(ids if kept is None else torch.from_numpy(kept)[ids], index)
            return found if kept is None else found[..., kept]

        with frozen_parameters(model):
            yield model, logits

    def window_losses(self, context: str, run: Run, part: slice) -> Array:
        """The mean loss of `run` on each window in `part` of the held-out text, per token of the whole vocabulary."""
        text = self._texts[context]
        return window_losses(_logits_of(run), text.windows[part], leading=len(text.leading), ratio=text.ratio)

    def dense_window_losses(self, context: str, part: slice) -> Array:
        """The same of the dense baseline, on the text as it reads it."""
        text = self._whole_text(context)
        return window_losses(_logits_of(eager_run(self._dense_model)), text.windows[part], leading=len(text.leading))

    def is_trimmed(self, context: str) -> bool:
        """Whether the engine cuts the text into other tokens than the dense baseline."""
        return self._texts[context].token_ids is not None

    @cached_property
    def _dense_model(self) -> LanguageModel:
        assert self._dense is not None
        return load_checkpoint(self._dense).model

    @cached_property
    def _compiled(self) -> Callable[..., torch.Tensor]:
        return torch.compile(self._dense_model, dynamic=True)

    def _run(self, model: LanguageModel, context: str, schemes: Schemes, *, round_inputs: bool = True) -> Run:
        index = torch.tensor(self.contexts.index(context)) if model.contexts else None
        eager = eager_run(model, index)
        if not schemes:
            return self.as_engine(context, eager)
        rounding = Rounding(model, schemes, self.calibration, inputs=round_inputs)

        def rounded(feeds: Feeds) -> Outputs:
            with rounding:
                return eager(feeds)

        return self.as_engine(context, rounded)

    def _text(self, context: str, trimmed: TrimmedVocabulary | None) -> _Text:
        ids = self._held_out[context]
        if trimmed is None:
            return self._whole_text(context)
        own = reencode(ids, self._tokenizer, trimmed)
        ratio = (len(own) - 1) / (len(ids) - 1) if len(ids) > 1 else 1.0
        return replace(self._cut(own, trimmed.tokenizer_json), token_ids=trimmed.kept, ratio=ratio)

    def _cut(self, ids: IntArray, tokenizer: str) -> _Text:
        leading = leading_tokens(tokenizer)
        return _Text(ids, consecutive_windows(ids, self.sequence, leading), leading)

    def _whole_text(self, context: str) -> _Text:
        """The held-out text as the dense model reads it."""
        return self._cut(self._held_out[context], self._tokenizer)

    def _dense_score(self, context: str, counted: Callable[[Run], Run]) -> Score | NotMeasured:
        if self._dense is None:
            return NotMeasured(NO_DENSE)
        if context not in self._dense_scores:
            run = counted(eager_run(self._dense_model))
            self._dense_scores[context] = self._score(run, self._whole_text(context))
        return self._dense_scores[context]

    def _runs_of_score(self, text: _Text) -> int:
        """How often `_score` runs the model."""
        generated = self._config.coherence and self._dense is not None and len(text.ids) >= PROMPT_TOKENS
        return -(-len(text.windows) // BATCH) + (NEW_TOKENS if generated and len(text.windows) else 0)

    def _score(self, run: Run, text: _Text) -> Score | NotMeasured:
        if not len(text.windows):
            return NotMeasured(NO_TEXT)
        logits_of = _logits_of(run)
        score = measure_score(logits_of, text.windows, leading=len(text.leading), ratio=text.ratio)
        if not self._config.coherence:
            return score
        if self._dense is None:
            return replace(score, coherence=NotMeasured(NO_DENSE))
        table = self._embeddings if text.token_ids is None else self._embeddings[text.token_ids]
        coherence = measure_coherence(logits_of, text.ids, table, leading=text.leading)
        return replace(score, coherence=NotMeasured(SHORT_TEXT) if coherence is None else coherence)

    @property
    def _embeddings(self) -> npt.NDArray[Any]:
        """The token embeddings of the dense baseline (vocabulary, width): its first parameter of that kind."""
        model = self._dense_model
        tables = (p for n, p in model.named_parameters() if model.parameter_kind(n) is UnitKind.VOCABULARY)
        table: npt.NDArray[Any] = next(tables).detach().numpy()
        return table


def _in_float64(model: LanguageModel) -> LanguageModel:
    """A copy in float64, without an intermediate one in float32.

    Casting takes the rotary frequencies along as they are in float32: both forms and the engine turn by the same
    angles, of which float64 only rounds less.
    """
    made = {id(parameter): nn.Parameter(parameter.detach().double()) for parameter in model.parameters()}
    return copy.deepcopy(model, made).double().eval()


def eager_run(model: Callable[..., torch.Tensor], context: torch.Tensor | None = None) -> Run:
    """An eager model as a function of numpy arrays."""

    def run(feeds: Feeds) -> Outputs:
        with torch.inference_mode():
            return {OUTPUT: model(torch.from_numpy(feeds[INPUT]), context).numpy()}

    return run


def _of_tokens(run: Run, token_ids: IntArray | None, *, all_logits: bool) -> Run:
    """`run`, which has the whole vocabulary, for ids that count only `token_ids`."""
    if token_ids is None:
        return run

    def of_tokens(feeds: Feeds) -> Outputs:
        logits = run({INPUT: token_ids[feeds[INPUT]]})[OUTPUT]
        return {OUTPUT: logits if all_logits else logits[..., token_ids]}

    return of_tokens


def _logits_of(run: Run) -> Any:
    return lambda ids: run({INPUT: ids})[OUTPUT]


def _digest(texts: Mapping[str, IntArray]) -> str:
    digest = hashlib.sha256()
    for context, ids in texts.items():
        digest.update(f"{context} {len(ids)}\n".encode() + ids.tobytes())
    return digest.hexdigest()
