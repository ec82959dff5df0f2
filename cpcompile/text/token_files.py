"""Token files: the second pass over the documents of each context, encoded and written to the cache.

The cache is named by a digest of settings and data, written to a folder beside it and renamed when
complete; one process builds, others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.stage_progress import StageProgress
from cpcompile.files.whole_files import NO_ROOM, only_process, unfinished
from cpcompile.text.documents import Source, pieces
from cpcompile.text.survey import Split, Survey
from cpcompile.text.tokenization import vocabulary_size
from cpcompile.text.vocabulary import end_of

PIECE = 16384
"""Characters that are encoded as one string, at most: bounds memory, and shares a long document among cores."""
BATCH = 32
"""Pieces that are encoded at once."""
BYTES_PER_TOKEN = 3
"""Roughly what small vocabularies reach; used to say how much room token files need."""


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


def write_token_files(
    folder: Path, sources: Sequence[Source], surveys: Mapping[str, Survey], tokenizer: Tokenizer, report: StageProgress
) -> None:
    """Write the cache `folder` whole or not at all."""
    total = sum(survey.bytes for survey in surveys.values())
    vocabulary = vocabulary_size(tokenizer)
    dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
    report.stage("tokens", total)
    try:
        if folder.exists():  # damaged
            shutil.rmtree(folder)
        with unfinished(folder, folder=True) as partial:
            contexts = {}
            for source in sources:
                survey = surveys[source.context]
                sides = _write_context(partial / "ids" / source.context, source, survey.split, tokenizer, dtype, report)
                contexts[source.context] = {"digest": survey.digest} | sides
                report.end()
            text = tokenizer.to_str()
            index = {"tokenizer": sha256(text), "vocabulary": vocabulary, "dtype": dtype.name, "contexts": contexts}
            for name, content in (("tokenizer.json", text), ("index.json", json.dumps(index, indent=1))):
                with (partial / name).open("wb") as stream:
                    stream.write(content.encode())
                    _sync(stream)
            partial.rename(folder)
    except OSError as error:
        raise _cannot_write(folder.parent, error, total // BYTES_PER_TOKEN * dtype.itemsize) from error


def _write_context(
    folder: Path, source: Source, split: Split, tokenizer: Tokenizer, dtype: npt.DTypeLike, report: StageProgress
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


@contextmanager
def one_builder(folder: Path, report: StageProgress) -> Iterator[None]:
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
    """Write `stream` to the disk: without it a renamed file can be empty after a power cut."""
    stream.flush()
    os.fsync(stream.fileno())


def sha256(text: str) -> str:
    """The digest of `text` in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
