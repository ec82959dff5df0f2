"""The first pass over the documents of each context: how many bytes, which digest, where the split lies.

A document is held out where the hash of seed and content lies below a threshold: copies of a document stay on one side,
also across contexts, and a new document moves no other. Where that would leave a side empty, the document next to the
threshold moves; a context of one document is cut at a line. The tokenizer learns from a sample of the training side.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cpcompile.core.errors import UsageError
from cpcompile.core.stage_progress import StageProgress
from cpcompile.text.documents import Source, pieces

SAMPLE = 4 * 2**20
"""Bytes per context that the tokenizer is trained on, at most."""
SAMPLE_PIECE = 2048
"""Characters of a document that the sample takes at a time."""
PLACES = 2**64


@dataclass(frozen=True)
class Split:
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
class Survey:
    """The result of the first pass over a context."""

    bytes: int
    train_bytes: int
    digest: str
    split: Split


def _place(seed: int, raw: bytes) -> int:
    """The hash of a document: uniform in [0, PLACES), the same for the same text."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=str(seed).encode()).digest())


def _line_end(text: str, target: int) -> int:
    """The line end nearest to `target` inside the text; without lines the nearest word end; otherwise `target`."""
    for mark in "\n", " ":
        ends = (text.rfind(mark, 0, target) + 1, text.find(mark, target, len(text) - 1) + 1)
        if any(ends):
            return min(filter(None, ends), key=lambda end: abs(end - target))
    return target


def survey_all(sources: Sequence[Source], seed: int, fraction: float, report: StageProgress) -> dict[str, Survey]:
    """The survey of every source, by context."""
    sizes = [source.size() for source in sources]
    report.stage("read", sum(sizes))
    surveys = {}
    before = 0
    for source, size in zip(sources, sizes, strict=True):
        surveys[source.context] = _survey(source, seed, fraction, partial(_reach, report, before, size))
        before += size
        report.reach(before)
    return surveys


def _reach(report: StageProgress, before: int, size: int, read: int) -> None:
    """So much of a source of `size` bytes is read; the text in records and packed files may have more bytes."""
    report.reach(before + min(read, size))


def _survey(source: Source, seed: int, fraction: float, reached: Callable[[int], None]) -> Survey:
    """Count, digest, and the threshold that leaves a document on each side if two differ."""
    digest = hashlib.sha256()
    split = Split(seed, fraction, round(fraction * PLACES))
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
        reached(total)
    if not total:
        raise UsageError(f"{source.path}: context {source.context!r} has no text; add some, or take it away")
    low, high = min(ends), max(ends)
    if low == high:
        split, held_out = replace(split, single=True), round(total * fraction)
    elif low >= split.threshold:
        split, held_out = replace(split, threshold=low + 1), ends[low]
    elif high < split.threshold:
        split, held_out = replace(split, threshold=high), total - ends[high]
    return Survey(total, max(1, total - held_out), digest.hexdigest(), split)


def sample_all(sources: Sequence[Source], surveys: Mapping[str, Survey], report: StageProgress) -> Iterator[str]:
    """The same number of bytes from every context: as many as the largest has, at most `SAMPLE`."""
    quota = min(SAMPLE, max(survey.train_bytes for survey in surveys.values()))
    report.stage("tokenizer", quota * len(sources))
    for source in sources:
        for piece in _sample(source, surveys[source.context], quota):
            report.add(len(piece.encode()))
            yield piece
        report.end()


def _sample(source: Source, survey: Survey, quota: int) -> Iterator[str]:
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
