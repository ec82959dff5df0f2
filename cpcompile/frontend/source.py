"""What a bundle is built from: a trained checkpoint with its dense baseline, or an exported program with gates."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.core.config import PretrainedConfig, TrainConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.generation import GenerationSettings
from cpcompile.core.measured import NotMeasured
from cpcompile.core.paths import calibration_path, dense_path
from cpcompile.core.rounding import UNCALIBRATED, Calibration
from cpcompile.core.selection import Digits, Selection, UnitKind
from cpcompile.core.types import Progress
from cpcompile.files.whole_files import scratch_folder
from cpcompile.frontend.calibration import load_calibration
from cpcompile.frontend.capture import capture, capture_dense
from cpcompile.frontend.checkpoint import Checkpoint, architecture, load_checkpoint
from cpcompile.frontend.program import Program, load_program
from cpcompile.models.language_model import LanguageModel
from cpcompile.partitioning.pretrained import PretrainedDecoder
from cpcompile.text.corpus import Corpus, load_corpus
from cpcompile.text.tokenization import leading_tokens, parse_tokenizer, vocabulary_size
from cpcompile.text.vocabulary import TrimmedVocabulary, cut_tokenizer, end_of, needed_tokens, order_tokens

FLOAT32_BYTES = 4
PROGRAM_SUFFIX = ".pt2"
LENGTHS = ("max_position_embeddings", "n_positions")
"""The settings of a pretrained model that say how many tokens it reads."""
NO_TOKENIZER = "{}: is a program and brings no tokenizer; leave --vocabulary-coverage out"


class Source(ABC):
    """A gated model with its contexts, and what it takes to compile and to validate it."""

    path: Path
    contexts: tuple[str, ...]
    architecture: str
    config: Mapping[str, Any]
    """The settings of the architecture that are numbers, strings or flags."""
    dense_bytes: int | None
    """Weights of the dense model in float32."""
    sequence: int | None = None
    """Tokens of a sequence that it was trained on."""
    training: Mapping[str, Any] | None = None
    """What the checkpoint records of its training; None where nothing is recorded."""
    tokenizer: str | None = None
    """The text of tokenizer.json."""
    generation: GenerationSettings | None = None
    """What generates text with it, in the ids of its own tokenizer; None if it reads no text."""
    selection: Digits | NotMeasured
    """`Selection.digits`."""
    has_text: bool
    """Whether its quality is measured as perplexity."""

    @abstractmethod
    def capture(self, *, opset: int) -> ir.Model:
        """The dynamic graph: any context, full cost."""

    def capture_dense(self, *, opset: int) -> ir.Model | None:
        """The graph of the dense baseline; None if there is none."""
        return None

    @abstractmethod
    def parameter_sizes(self) -> dict[str, int]:
        """Elements of every parameter but the gates, by name."""

    @abstractmethod
    def kept_sizes(self, context: str, tokens: int | None) -> Mapping[str, int]:
        """What `context` keeps of them, with `tokens` of the vocabulary; None for all."""

    @abstractmethod
    def parameter_kind(self, name: str) -> UnitKind | None:
        """The kind of unit whose removal makes the parameter `name` smaller; None if nothing does."""

    @property
    def unused(self) -> frozenset[str]:
        """Parameters that the forward pass does not read, by name."""
        return frozenset()

    @property
    def calibration(self) -> Calibration:
        """What its parameters are rounded to; UsageError if the file that says it is not the model's."""
        return UNCALIBRATED

    @abstractmethod
    def trim(
        self, contexts: Sequence[str], coverage: float
    ) -> tuple[npt.NDArray[np.int64], dict[str, TrimmedVocabulary]]:
        """The vocabulary of each of `contexts`, and the order of the whole one in which they have runs of rows."""

    def choose(self, contexts: Sequence[str] | None) -> tuple[str, ...]:
        """Those of `contexts`, or all; UsageError lists what there is."""
        return choose_contexts(self.path, self.contexts, contexts)


def choose_contexts(path: Path, there: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Those of `wanted`, or all that are `there`; UsageError lists them."""
    for context in wanted or ():
        if context not in there:
            raise UsageError(f"{path}: has no context {context!r}; it has {', '.join(there)}")
    return tuple(wanted or there)


def require_selection(path: Path, checkpoint: Checkpoint) -> Selection:
    """Which units its contexts keep; UsageError if it is a dense checkpoint."""
    if checkpoint.selection is None:
        raise UsageError(
            f"{path}: is a dense checkpoint and has no contexts; give the partitioned one, such as model.pt"
        )
    return checkpoint.selection


def open_source(model: Path) -> Source:
    """What `model` holds, by its suffix; UsageError says what is wrong with it."""
    return ProgramSource(model) if model.suffix == PROGRAM_SUFFIX else TrainedSource(model)


class TrainedSource(Source):
    """A checkpoint and, where it lies beside it, the dense baseline of the same run."""

    has_text = True

    def __init__(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        self._selection = require_selection(path, checkpoint)
        try:
            entries = vocabulary_size(parse_tokenizer(checkpoint.tokenizer))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: its tokenizer is malformed ({error}); train it again") from error
        if entries > checkpoint.config.vocabulary:
            raise UsageError(f"{path}: its tokenizer has {entries} entries, the model {checkpoint.config.vocabulary}")
        self.path = path
        self.training = checkpoint.training
        self.contexts = checkpoint.contexts
        self.tokenizer = checkpoint.tokenizer
        self.architecture = architecture(checkpoint.config)
        settings = checkpoint.config
        plain = settings.settings if isinstance(settings, PretrainedConfig) else dataclasses.asdict(settings)
        self.config = {name: value for name, value in plain.items() if isinstance(value, int | float | str)}
        self.checkpoint = checkpoint
        self.generation = _generation(checkpoint)
        self.sequence: int = int(self._settings.get("sequence", TrainConfig.sequence))
        self.selection = self._selection.digits(
            {
                kind: [(f"layer {number}", table.shape[2]) for number in range(table.shape[1])]
                for kind, table in self._selection.kept.items()
            }
        )
        self.dense = dense_path(path) if dense_path(path).exists() else None
        self.dense_bytes = _dense_bytes(self.dense, path, checkpoint) if self.dense else None

    @property
    def _eager(self) -> LanguageModel:
        return self.checkpoint.model

    def capture(self, *, opset: int) -> ir.Model:
        return capture(self._eager, opset=opset, cached=True)

    def capture_dense(self, *, opset: int) -> ir.Model | None:
        return capture_dense(load_checkpoint(self.dense).model, opset=opset) if self.dense else None

    def parameter_sizes(self) -> dict[str, int]:
        return self._eager.parameter_sizes()

    def kept_sizes(self, context: str, tokens: int | None) -> Mapping[str, int]:
        return self._eager.kept_with_tokens(self._selection, context, tokens)

    def parameter_kind(self, name: str) -> UnitKind | None:
        return self._eager.parameter_kind(name)

    @cached_property
    def calibration(self) -> Calibration:
        path = calibration_path(self.path)
        there = path.exists() or path.is_symlink()  # a link to nothing is an error, not an absence
        return load_calibration(path, self.path, self._eager) if there else UNCALIBRATED

    @property
    def unused(self) -> frozenset[str]:
        model = self._eager
        return frozenset(model.partitioned.unused if isinstance(model, PretrainedDecoder) else ())

    def trim(
        self, contexts: Sequence[str], coverage: float
    ) -> tuple[npt.NDArray[np.int64], dict[str, TrimmedVocabulary]]:
        counts, tokenizer = self.checkpoint.token_counts, self.checkpoint.tokenizer
        missing = [context for context in contexts if context not in counts]
        if missing:
            raise UsageError(f"the checkpoint has no token counts of {', '.join(missing)}; train it again")
        needed = {c: needed_tokens(tokenizer, counts[c], coverage=coverage) for c in contexts}
        order = order_tokens(tokenizer, list(needed.values()), self.checkpoint.config.vocabulary)
        return order, {c: cut_tokenizer(tokenizer, order[np.isin(order, ids)]) for c, ids in needed.items()}

    def held_out(self, data: Path | None, progress: Progress) -> Mapping[str, npt.NDArray[np.int32]]:
        """Held-out token ids per context: of the text in `data`, or what the checkpoint brings."""
        if data is None:
            return self.checkpoint.held_out
        limit = self._settings.get("held_out_tokens", TrainConfig.held_out_tokens)
        held_out = self.corpus(data, progress).held_out
        return {c: np.asarray(held_out[c].ids[: limit + 1], dtype=np.int32) for c in self.contexts}

    def corpus(self, data: Path, progress: Progress) -> Corpus:
        """The text in `data` as training splits it; UsageError if a context has none."""
        with tokenizer_file(self.tokenizer) as tokenizer:
            corpus = load_corpus(
                data,
                vocabulary=self.checkpoint.config.vocabulary,
                sequence=self.sequence,
                held_out_fraction=self._settings.get("held_out_fraction", TrainConfig.held_out_fraction),
                seed=self._settings.get("seed", TrainConfig.seed),
                tokenizer=tokenizer,
                progress=progress,
            )
        missing = [context for context in self.contexts if context not in corpus.contexts]
        if missing:
            raise UsageError(f"{data}: has no text for {', '.join(missing)}; it has {', '.join(corpus.contexts)}")
        return corpus

    @property
    def _settings(self) -> Mapping[str, Any]:
        """Of its training."""
        found: Mapping[str, Any] = self.checkpoint.training.get("settings", {})
        return found


class ProgramSource(Source):
    """A `torch.export` program whose gates were inserted with `partition`."""

    architecture = "program"
    has_text = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.program: Program = load_program(path)
        self.contexts = self.program.contexts
        self.config = {}
        unknown = NotMeasured("the program was saved without its selection; save it again")
        self.selection = unknown if self.program.selection is None else self.program.selection
        sizes = self.parameter_sizes()
        self.dense_bytes = sum(sizes[name] for name in sizes.keys() - self.unused) * FLOAT32_BYTES

    def capture(self, *, opset: int) -> ir.Model:
        return self.program.capture(opset=opset)

    def parameter_sizes(self) -> dict[str, int]:
        return self.program.parameter_sizes()

    def kept_sizes(self, context: str, tokens: int | None) -> Mapping[str, int]:
        return self.program.kept[context]

    def parameter_kind(self, name: str) -> UnitKind | None:
        return self.program.kinds.get(name)

    @property
    def unused(self) -> frozenset[str]:
        return frozenset(self.program.unused)

    def trim(
        self, contexts: Sequence[str], coverage: float
    ) -> tuple[npt.NDArray[np.int64], dict[str, TrimmedVocabulary]]:
        raise UsageError(NO_TOKENIZER.format(self.path))


def _generation(checkpoint: Checkpoint) -> GenerationSettings:
    tokenizer, config = parse_tokenizer(checkpoint.tokenizer), checkpoint.config
    settings = config.settings if isinstance(config, PretrainedConfig) else {}
    end = settings.get("eos_token_id")
    ends = {tokenizer.token_to_id(end_of(tokenizer)), *(end if isinstance(end, list) else [end])}
    limit = next((settings[name] for name in LENGTHS if isinstance(settings.get(name), int)), None)
    return GenerationSettings(
        end=tuple(sorted(number for number in ends if isinstance(number, int))),
        leading=leading_tokens(checkpoint.tokenizer),
        context_length=limit,
        chat_template=config.chat_template if isinstance(config, PretrainedConfig) else None,
    )


def _dense_bytes(path: Path, model: Path, checkpoint: Checkpoint) -> int:
    """Bytes of the weights in `path`, which are not read; UsageError if it is not the dense baseline of `model`."""
    dense = load_checkpoint(path, mapped=True)
    same_run = dense.training.get("run") == checkpoint.training.get("run")
    if dense.selection is not None or not same_run or dense.tokenizer != checkpoint.tokenizer:
        raise UsageError(
            f"{path}: is not the dense baseline that was trained with {model}; put that one there (a training that was "
            "interrupted goes on with --resume), or take it away to build without a comparison"
        )
    return sum(tensor.numel() for tensor in dense.state.values()) * FLOAT32_BYTES


@contextmanager
def tokenizer_file(text: str | None) -> Iterator[Path | None]:
    """A temporary tokenizer.json with that text; None for None."""
    if text is None:
        yield None
        return
    with scratch_folder("tokenizer") as folder:
        path = folder / "tokenizer.json"
        path.write_text(text, encoding="utf-8")
        yield path
