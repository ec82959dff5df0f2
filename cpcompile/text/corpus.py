"""From text per context to memory-mapped token ids.

    sources -> survey (count, hash, threshold) -> tokenizer -> token files -> Corpus
                                                  |----- cache folder -----|

Each arrow is one pass over documents that are never all in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.stage_progress import StageProgress
from cpcompile.core.types import Progress
from cpcompile.files.whole_files import cache_folder
from cpcompile.text.documents import find_sources
from cpcompile.text.survey import sample_all, survey_all
from cpcompile.text.token_files import one_builder, sha256, write_token_files
from cpcompile.text.tokenization import (
    LEAST_VOCABULARY,
    leading_tokens,
    parse_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from cpcompile.text.vocabulary import END

IntArray = npt.NDArray[np.int64]

FORMAT = 1
"""The format of the cache; a change invalidates old caches."""


@dataclass(frozen=True, eq=False)
class TokenFile:
    """One side of one context: token ids (1-D, memory-mapped, uint16 or uint32), each document ended by `end_of`."""

    ids: npt.NDArray[np.unsignedinteger[Any]]
    documents: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids of every context, split into what is trained on and what is held out."""

    contexts: tuple[str, ...]
    """Sorted; a context's position is its index everywhere."""
    tokenizer: str
    """The text of a tokenizer.json; `tokenization.parse_tokenizer` opens it."""
    vocabulary: int
    train: Mapping[str, TokenFile]
    held_out: Mapping[str, TokenFile]
    digests: Mapping[str, str]
    """SHA-256 of each context's documents in order, whatever files they came from."""

    @cached_property
    def leading(self) -> tuple[int, ...]:
        """The ids with which every window starts, see `leading_tokens`; they are not in the token files."""
        return leading_tokens(self.tokenizer)

    def batch(self, context: str, *, step: int, sequences: int, length: int, seed: int) -> IntArray:
        """Training windows (sequences, length + 1): a pure function of the arguments and the data."""
        ids = self.train[context].ids
        taken = _text_length(f"context {context!r}", "training", len(ids), length, self.leading)
        rng = np.random.default_rng([seed, step, self.contexts.index(context)])
        return cut_windows(ids, rng.integers(len(ids) - taken, size=sequences), taken, self.leading)

    def held_out_windows(self, context: str, *, length: int, tokens: int) -> IntArray:
        """Consecutive windows (n, length + 1) from the start of the held-out ids, for `tokens` predictions at most.

        The last id of a window is the first of the text in the next, so each token is predicted once. n is at least 1.
        """
        ids = self.held_out[context].ids
        taken = _text_length(f"context {context!r}", "held-out", len(ids), length, self.leading)
        count = max(1, min(tokens, len(ids) - 1) // taken)
        return cut_windows(ids, np.arange(count) * taken, taken, self.leading)


def cut_windows(ids: npt.NDArray[Any], starts: IntArray, taken: int, leading: Sequence[int]) -> IntArray:
    """Windows (starts, leading + taken + 1): the ids `leading`, then the `taken` + 1 ids from each start."""
    text = np.asarray(ids[starts[:, None] + np.arange(taken + 1)], dtype=np.int64)
    return np.concatenate([np.tile(np.asarray(leading, dtype=np.int64), (len(text), 1)), text], axis=1)


def _text_length(where: str, side: str, tokens: int, length: int, leading: Sequence[int]) -> int:
    """How many tokens of a window of `length` are predicted; UsageError if there are none or too few tokens."""
    if length <= len(leading):
        raise UsageError(f"train.sequence is {length}: the tokenizer's own {len(leading)} leading tokens fill it")
    if tokens <= length - len(leading):
        fraction = ", raise train.held_out_fraction" if side == "held-out" else ""
        raise UsageError(
            f"{where}: {tokens} {side} tokens are too few for one sequence of {length} and the token after it; "
            f"add text{fraction} or lower train.sequence"
        )
    return length - len(leading)


def load_corpus(
    data: Path,
    *,
    vocabulary: int,
    sequence: int,
    held_out_fraction: float,
    seed: int,
    text_field: str = "text",
    tokenizer: Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus in the folder `data` (`documents` says what it may hold), from the cache if possible.

    `vocabulary` is a maximum; `tokenizer` is a tokenizer.json to use instead of training one. `sequence` is the
    length that both sides of every context have to fill at least once. `cache` is by default
    `$XDG_CACHE_HOME/cpcompile`. UsageError for data or settings that are wrong, CpcompileError for a full disk.
    """
    if not 0 < held_out_fraction < 1:
        raise UsageError(f"train.held_out_fraction is {held_out_fraction}: it lies between 0 and 1")
    if sequence < 1:
        raise UsageError(f"train.sequence is {sequence}: it has to be at least 1")
    if seed < 0:
        raise UsageError(f"train.seed is {seed}: it cannot be negative")
    if vocabulary < LEAST_VOCABULARY:
        raise UsageError(f"model.vocabulary is {vocabulary}: every byte and {END} need at least {LEAST_VOCABULARY}")
    sources = find_sources(data, text_field)
    given = read_tokenizer(tokenizer, vocabulary) if tokenizer else None
    settings = {
        "format": FORMAT,
        "tokenizers": tokenizers.__version__,
        "tokenizer": given.to_str() if given else None,
        "vocabulary": vocabulary,
        "held_out_fraction": held_out_fraction,
        "seed": seed,
        "text_field": text_field,
        "data": {source.context: source.fingerprint() for source in sources},
    }
    folder = (cache or cache_folder()) / sha256(json.dumps(settings, sort_keys=True))[:32]
    corpus = _open(folder)
    if corpus is None:
        report = StageProgress(progress)
        with one_builder(folder, report):
            corpus = _open(folder)  # another process may have built it meanwhile
            if corpus is None:
                surveys = survey_all(sources, seed, held_out_fraction, report)
                made = given or train_tokenizer(sample_all(sources, surveys, report), vocabulary)
                write_token_files(folder, sources, surveys, made, report)
                corpus = _open(folder)
    if corpus is None:
        raise CpcompileError(f"{folder}: the token files just written cannot be read; choose another cache folder")
    for source in sources:
        where = f"{source.path}: context {source.context!r}"
        _text_length(where, "training", len(corpus.train[source.context].ids), sequence, corpus.leading)
        _text_length(where, "held-out", len(corpus.held_out[source.context].ids), sequence, corpus.leading)
    return corpus


def _open(folder: Path) -> Corpus | None:
    """The corpus in a cache folder; None where there is none or a file is missing or not as it was written."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        text = (folder / "tokenizer.json").read_bytes().decode()
        if sha256(text) != index["tokenizer"]:
            return None
        parse_tokenizer(text)
        contexts = index["contexts"]
        train, held_out = (
            {
                context: _token_file(folder / "ids" / context / side, np.dtype(index["dtype"]), **entry[side])
                for context, entry in contexts.items()
            }
            for side in ("train", "held_out")
        )
        return Corpus(
            contexts=tuple(sorted(contexts)),
            tokenizer=text,
            vocabulary=int(index["vocabulary"]),
            train=MappingProxyType(train),
            held_out=MappingProxyType(held_out),
            digests=MappingProxyType({context: str(entry["digest"]) for context, entry in contexts.items()}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _token_file(path: Path, dtype: np.dtype[Any], *, tokens: int, documents: int) -> TokenFile:
    if path.stat().st_size != tokens * dtype.itemsize:
        raise ValueError(f"{path} has not the size that the index says")
    # An empty file cannot be mapped.
    ids = np.memmap(path, dtype, mode="r", shape=(tokens,)) if tokens else np.zeros(0, dtype)
    return TokenFile(ids, documents)
