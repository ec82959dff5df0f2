"""From text per context to memory-mapped token ids.

    sources -> survey (count, hash, threshold) -> tokenizer -> token files -> Corpus
                                                  |----- cache folder -----|

Each arrow is one pass over documents that are never all in memory. A document is held out where
the hash of seed and content lies below a threshold: copies of a document stay on one side, also
across contexts, and a new document moves no other. Where that would leave a side empty, the
document next to the threshold moves; a context of one document is cut at a line.

The cache is named by a digest of settings and data, written to a folder beside it and renamed when
complete; one process builds, others wait for it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Tokenizer

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.types import Progress
from cpcompile.files.whole_files import NO_ROOM, cache_folder, only_process
from cpcompile.text.documents import Source, find_sources, pieces
from cpcompile.text.tokenization import (
    LEAST_VOCABULARY,
    parse_tokenizer,
    read_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from cpcompile.text.vocabulary import END, end_of

IntArray = npt.NDArray[np.int64]

FORMAT = 1
"""Of the cache; a change makes old caches unused."""
SAMPLE = 4 * 2**20
"""Bytes per context that the tokenizer is trained on, at most."""
SAMPLE_PIECE = 2048
"""Characters of a document that the sample takes at a time."""
PIECE = 16384
"""Characters that are encoded as one string, at most: bounds memory, and shares a long document among cores."""
BATCH = 32
"""Pieces that are encoded at once."""
BYTES_PER_TOKEN = 3
"""About what small vocabularies reach; for saying how much room token files need."""
PLACES = 2**64


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

    def batch(self, context: str, *, step: int, sequences: int, length: int, seed: int) -> IntArray:
        """Training windows (sequences, length + 1): a pure function of the arguments and the data."""
        ids = self.train[context].ids
        _require_tokens(f"context {context!r}", "training", len(ids), length)
        rng = np.random.default_rng([seed, step, self.contexts.index(context)])
        return _windows(ids, rng.integers(len(ids) - length, size=sequences), length)

    def held_out_windows(self, context: str, *, length: int, tokens: int) -> IntArray:
        """Consecutive windows (n, length + 1) from the start of the held-out ids, for `tokens` predictions at most.

        The last id of a window is the first of the next, so each token is predicted once. n is at least 1.
        """
        ids = self.held_out[context].ids
        _require_tokens(f"context {context!r}", "held-out", len(ids), length)
        count = max(1, min(tokens, len(ids) - 1) // length)
        return _windows(ids, np.arange(count) * length, length)


def _windows(ids: npt.NDArray[Any], starts: IntArray, length: int) -> IntArray:
    return np.asarray(ids[starts[:, None] + np.arange(length + 1)], dtype=np.int64)


def _require_tokens(where: str, side: str, tokens: int, length: int) -> None:
    if tokens <= length:
        fraction = ", raise train.held_out_fraction" if side == "held-out" else ""
        raise UsageError(
            f"{where}: {tokens} {side} tokens are too few for one sequence of {length} and the token after it; "
            f"add text{fraction} or lower train.sequence"
        )


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
    """The corpus in the folder `data` (`text_sources` says what it may hold), from the cache if it is there.

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
    folder = (cache or cache_folder()) / _sha256(json.dumps(settings, sort_keys=True))[:32]
    corpus = _open(folder)
    if corpus is None:
        report = _Report(progress)
        with _one_builder(folder, report):
            corpus = _open(folder)  # another process may have built it meanwhile
            if corpus is None:
                surveys = _survey_all(sources, seed, held_out_fraction, report)
                made = given or train_tokenizer(_sample_all(sources, surveys, report), vocabulary)
                _build(folder, sources, surveys, made, report)
                corpus = _open(folder)
    if corpus is None:
        raise CpcompileError(f"{folder}: the token files just written cannot be read; choose another cache folder")
    for source in sources:
        where = f"{source.path}: context {source.context!r}"
        _require_tokens(where, "training", len(corpus.train[source.context].ids), sequence)
        _require_tokens(where, "held-out", len(corpus.held_out[source.context].ids), sequence)
    return corpus


@dataclass(frozen=True)
class _Split:
    """Which side a document is on; with `single`, every document is cut in two."""

    seed: int
    fraction: float
    threshold: int
    single: bool = False

    def __call__(self, text: str) -> tuple[str, str]:
        """The text to train on and the text to hold out; one is empty unless the document is cut."""
        if self.single:
            end = _line_end(text, max(1, len(text) - max(1, round(len(text) * self.fraction))))
            return text[:end], text[end:]
        return ("", text) if _place(self.seed, text.encode()) < self.threshold else (text, "")


@dataclass(frozen=True)
class _Survey:
    """What the first pass finds out about a context."""

    bytes: int
    train_bytes: int
    digest: str
    split: _Split


def _place(seed: int, raw: bytes) -> int:
    """Where a document stands among all that could be: uniform in [0, PLACES), the same for the same text."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=str(seed).encode()).digest())


def _line_end(text: str, target: int) -> int:
    """The end of a line nearest to `target`, inside the text; without lines of a word; else `target` itself."""
    for mark in "\n", " ":
        ends = (text.rfind(mark, 0, target) + 1, text.find(mark, target, len(text) - 1) + 1)
        if any(ends):
            return min(filter(None, ends), key=lambda end: abs(end - target))
    return target


def _survey_all(sources: Sequence[Source], seed: int, fraction: float, report: _Report) -> dict[str, _Survey]:
    report.stage("read", None)
    surveys = {}
    for source in sources:
        surveys[source.context] = _survey(source, seed, fraction, report)
        report.end()
    return surveys


def _survey(source: Source, seed: int, fraction: float, report: _Report) -> _Survey:
    """Count, digest, and the threshold that leaves a document on each side if two differ."""
    digest = hashlib.sha256()
    split = _Split(seed, fraction, round(fraction * PLACES))
    total = held_out = 0
    ends: dict[int, int] = {}  # bytes at the lowest and the highest place
    for text in source.documents():
        raw = text.encode()
        digest.update(len(raw).to_bytes(8))
        digest.update(raw)
        place = _place(seed, raw)
        total += len(raw)
        held_out += len(raw) * (place < split.threshold)
        ends[place] = ends.get(place, 0) + len(raw)
        ends = {end: ends[end] for end in {min(ends), max(ends)}}
        report.add(len(raw))
    if not total:
        raise UsageError(f"{source.path}: context {source.context!r} has no text; add some, or take it away")
    low, high = min(ends), max(ends)
    if low == high:
        split, held_out = replace(split, single=True), round(total * fraction)
    elif low >= split.threshold:
        split, held_out = replace(split, threshold=low + 1), ends[low]
    elif high < split.threshold:
        split, held_out = replace(split, threshold=high), total - ends[high]
    return _Survey(total, max(1, total - held_out), digest.hexdigest(), split)


def _sample_all(sources: Sequence[Source], surveys: Mapping[str, _Survey], report: _Report) -> Iterator[str]:
    """The same number of bytes of every context: as many as the largest has, at most `SAMPLE`."""
    quota = min(SAMPLE, max(survey.train_bytes for survey in surveys.values()))
    report.stage("tokenizer", quota * len(sources))
    for source in sources:
        for piece in _sample(source, surveys[source.context], quota):
            report.add(len(piece.encode()))
            yield piece
        report.end()


def _sample(source: Source, survey: _Survey, quota: int) -> Iterator[str]:
    """Pieces taken in even steps from all training text; text shorter than `quota` is repeated."""
    texts: Iterator[str] = (train for text in source.documents() if (train := survey.split(text)[0]))
    if survey.train_bytes < quota:
        texts = itertools.cycle(texts)  # keeps at most `quota` bytes
    rate = min(1.0, quota / survey.train_bytes)
    seen = taken = 0
    for text in texts:
        for piece in pieces([text], SAMPLE_PIECE):
            size = len(piece.encode())
            seen += size
            if taken + size / 2 <= rate * seen:
                taken += size
                yield piece
            if taken >= quota:
                return


class _TokenWriter:
    """Appends documents to a file of token ids, a bounded batch of pieces at a time."""

    def __init__(self, path: Path, tokenizer: Tokenizer, dtype: npt.DTypeLike) -> None:
        self._stream = path.open("wb")
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._end = [tokenizer.get_vocab()[end_of(tokenizer)]]
        self._pieces: list[str] = []
        self._closes: list[bool] = []
        self.tokens = 0
        self.documents = 0

    def add(self, text: str) -> None:
        for piece in pieces([text], PIECE):
            if len(self._pieces) == BATCH:
                self._encode()
            self._pieces.append(piece)
            self._closes.append(False)
        self._closes[-1] = True
        self.documents += 1

    def _encode(self) -> None:
        ids: list[int] = []
        encodings = self._tokenizer.encode_batch_fast(self._pieces, add_special_tokens=False)
        for encoding, closes in zip(encodings, self._closes, strict=True):
            ids += encoding.ids + self._end * closes
        self._stream.write(np.array(ids, dtype=self._dtype).tobytes())
        self.tokens += len(ids)
        self._pieces.clear()
        self._closes.clear()

    def finish(self) -> dict[str, int]:
        self._encode()
        _sync(self._stream)
        return {"tokens": self.tokens, "documents": self.documents}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _build(
    folder: Path, sources: Sequence[Source], surveys: Mapping[str, _Survey], tokenizer: Tokenizer, report: _Report
) -> None:
    """Write the cache `folder`: all of it or nothing."""
    partial = folder.with_name(f"{folder.name}.partial")
    total = sum(survey.bytes for survey in surveys.values())
    vocabulary = vocabulary_size(tokenizer)
    dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
    report.stage("tokens", total)
    try:
        for stale in partial, folder:  # left by a build that was killed; damaged
            if stale.exists():
                shutil.rmtree(stale)
        contexts = {}
        for source in sources:
            survey = surveys[source.context]
            sides = _write_context(partial / "ids" / source.context, source, survey.split, tokenizer, dtype, report)
            contexts[source.context] = {"digest": survey.digest} | sides
            report.end()
        text = tokenizer.to_str()
        index = {"tokenizer": _sha256(text), "vocabulary": vocabulary, "dtype": dtype.name, "contexts": contexts}
        for name, content in (("tokenizer.json", text), ("index.json", json.dumps(index, indent=1))):
            with (partial / name).open("wb") as stream:
                stream.write(content.encode())
                _sync(stream)
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_write(folder.parent, error, total // BYTES_PER_TOKEN * dtype.itemsize) from error
        raise


def _write_context(
    folder: Path, source: Source, split: _Split, tokenizer: Tokenizer, dtype: npt.DTypeLike, report: _Report
) -> dict[str, dict[str, int]]:
    folder.mkdir(parents=True)
    with (
        _TokenWriter(folder / "train", tokenizer, dtype) as train,
        _TokenWriter(folder / "held_out", tokenizer, dtype) as held_out,
    ):
        for text in source.documents():
            for writer, part in zip((train, held_out), split(text), strict=True):
                if part:
                    writer.add(part)
            report.add(len(text.encode()))
        return {"train": train.finish(), "held_out": held_out.finish()}


def _open(folder: Path) -> Corpus | None:
    """The corpus in a cache folder; None where there is none or a file is missing or not as it was written."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        text = (folder / "tokenizer.json").read_bytes().decode()
        if _sha256(text) != index["tokenizer"]:
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


@contextmanager
def _one_builder(folder: Path, report: _Report) -> Iterator[None]:
    """Wait until no other process builds `folder`."""
    lock = only_process(
        folder.with_name(f"{folder.name}.lock"), on_wait=lambda: report.stage("wait for another build", None)
    )
    with ExitStack() as held:
        try:
            held.enter_context(lock)
        except OSError as error:
            raise _cannot_write(folder.parent, error, None) from error
        yield


def _cannot_write(cache: Path, error: OSError, needed: int | None) -> CpcompileError:
    if error.errno not in NO_ROOM:
        return UsageError(f"{cache}: cannot be written ({error.strerror or error}); choose another cache folder")
    room = "" if needed is None else f" of about {needed / 1e6:.3f} MB"
    return CpcompileError(
        f"{cache}: no room for the token files{room}: {error.strerror}; make room there or choose another cache folder"
    )


def _sync(stream: IO[bytes]) -> None:
    """A file that is renamed into place before its bytes are on the disk can be found empty after a power cut."""
    stream.flush()
    os.fsync(stream.fileno())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class _Report:
    """Calls `progress` when a stage begins, after every context, and ten times a second at most in between."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._name = ""
        self._done = 0
        self._total: int | None = None
        self._last = 0.0

    def stage(self, name: str, total: int | None) -> None:
        self._name, self._done, self._total = name, 0, total
        self.end()

    def add(self, amount: int) -> None:
        self._done += amount
        if time.perf_counter() - self._last >= 0.1:
            self.end()

    def end(self) -> None:
        self._last = time.perf_counter()
        if self._progress:
            self._progress(self._name, self._done, self._total)
