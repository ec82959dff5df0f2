"""Where text comes from: the contexts in a data folder, and the documents of each.

    DIR/de/**                 every file is a document, in the order of the relative paths
    DIR/fr.txt                documents of whole paragraphs, at most 8192 characters each
    DIR/py.jsonl, .jsonl.gz   the text field of every record is a document
    DIR/law.parquet           the same, row group by row group

Documents are generators: one document (of a Parquet file: one row group) is in memory at a time.
Text is strict UTF-8 and stays as it is, line ends included; a document of white space alone is
left out. Links are followed wherever they lead, but no file or folder is read twice for one context.
Hidden files are skipped. Nothing else is skipped silently.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpcompile.core.config import require_context_name
from cpcompile.core.errors import UsageError
from cpcompile.files.pointers import require_fetched

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
TEXT_DOCUMENT = 8192
"""Characters that a document cut from a .txt file has at most."""
CONTENT_LIMIT = 256 * 2**20
"""Largest context in bytes whose fingerprint covers its contents; larger ones use modification times."""
BLOCK = 2**20
BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


@dataclass(frozen=True)
class Source:
    """The text of one context: a folder of documents, or one file."""

    context: str
    path: Path
    files: tuple[Path, ...]
    text_field: str = "text"

    def documents(self) -> Iterator[str]:
        """Every document that holds more than white space; UsageError names the file and the place."""
        return (text for text in self._texts() if text and not text.isspace())

    def _texts(self) -> Iterator[str]:
        for path in self.files:
            require_fetched(path)
        if self.path.is_dir():
            for path in self.files:
                yield "".join(_decoded(path))
            return
        suffix = _suffix(self.path)
        if suffix == ".txt":
            yield from pieces(_decoded(self.path), TEXT_DOCUMENT)
        elif suffix == ".parquet":
            yield from _parquet(self.path, self.text_field)
        else:
            yield from _json_lines(self.path, self.text_field)

    def size(self) -> int:
        """Bytes of all files."""
        with _reading(self.path):
            return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and contents; above `CONTENT_LIMIT` of modification times instead of contents."""
        digest = hashlib.sha256()
        with _reading(self.path):
            states = [path.stat() for path in self.files]
        cheap = sum(state.st_size for state in states) <= CONTENT_LIMIT
        for path, state in zip(self.files, states, strict=True):
            with _reading(path):
                mark = _content(path) if cheap else str(state.st_mtime_ns)
            name = os.fsencode(path.relative_to(self.path.parent))
            digest.update(repr((name, state.st_size, mark)).encode())
        return digest.hexdigest()


def find_sources(data: Path, text_field: str = "text") -> tuple[Source, ...]:
    """The contexts in the folder `data`, sorted by name; UsageError if there are not at least two."""
    if not data.is_dir():
        raise UsageError(f"{data}: is not a folder; give a folder with one sub-folder or file of text per context")
    sources: dict[str, Source] = {}
    with _reading(data):
        entries = sorted(entry for entry in data.iterdir() if not entry.name.startswith("."))
    for path in entries:
        _require_there(path)
        source = Source(_context(path), path, _files(path), text_field)
        if source.context in sources:
            raise UsageError(
                f"{path} and {sources[source.context].path} are both the context {source.context!r}; "
                "join them in one sub-folder, or rename one"
            )
        sources[source.context] = source
    if len(sources) < 2:
        found = f"only the context {next(iter(sources))!r}" if sources else "no context"
        raise UsageError(
            f"{data}: holds {found} and at least two are needed; put one sub-folder or one "
            f"{', '.join(SUFFIXES)} file per context there"
        )
    return tuple(sources[context] for context in sorted(sources))


def pieces(blocks: Iterable[str], limit: int) -> Iterator[str]:
    """The text of `blocks` in parts of at most `limit` characters.

    A part ends after a blank line where there is one, else after a line, else before a space, else anywhere.
    """
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > limit:
            end = _cut(rest, start, start + limit)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _cut(text: str, start: int, stop: int) -> int:
    blank = 0
    for match in BLANK_LINE.finditer(text, start, stop):
        blank = match.end()
    return blank or text.rfind("\n", start, stop) + 1 or max(text.rfind(" ", start + 1, stop), 0) or stop


def _context(path: Path) -> str:
    name = path.name.lower()
    if not path.is_dir():
        suffix = _suffix(path)
        if not suffix:
            raise UsageError(
                f"{path}: is none of {', '.join(SUFFIXES)} and no folder; convert it, take it away, or hide it "
                "(a leading dot)"
            )
        name = name.removesuffix(suffix)
    require_context_name(name, str(path))
    return name


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def _files(path: Path) -> tuple[Path, ...]:
    """The files of one entry of the data folder, in a fixed order."""
    if not path.is_dir():
        if not path.is_file():
            raise UsageError(f"{path}: is not a regular file; put the text itself there")
        return (path,)
    real = os.path.realpath(path)
    return tuple(sorted(_below(path, real, {real}), key=lambda file: file.relative_to(path).as_posix()))


def _below(folder: Path, real: str, seen: set[str]) -> Iterator[Path]:
    """The regular files below `folder`, which is `real` without links; each but those `seen`, which grows."""
    with _reading(folder):
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    entries = [folder / name for name in names]
    for path in sorted(entries, key=lambda path: path.is_symlink()):  # a link to a neighbour gives way to it
        _require_there(path)
        own = os.path.realpath(path) if path.is_symlink() else f"{real}/{path.name}"
        if own in seen:
            continue
        seen.add(own)
        if path.is_dir():
            yield from _below(path, own, seen)
        elif path.is_file():
            yield path


def _require_there(path: Path) -> None:
    """UsageError for a link that leads nowhere: skipping it would lose text."""
    if path.is_symlink() and not path.exists():
        raise UsageError(
            f"{path}: is a link to {path.readlink()}, which is not there; fetch that (`git annex get` or the like), "
            "or remove the link"
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
    except RuntimeError as error:  # pathlib, of links that lead to themselves
        raise UsageError(f"{path}: cannot be read ({error})") from error


def _content(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file in blocks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with _reading(path), path.open("rb") as stream:
        while True:
            block = stream.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - pending + error.start) from error
            if not block:
                return
            offset += len(block)
            yield text


def _json_lines(path: Path, field: str) -> Iterator[str]:
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: is not valid JSON ({error}); every line has to be one object") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}: is not a JSON object; every line has to be one, with a field {field!r}")
        if field not in record:
            raise _no_field(where, field, record)
        yield _checked(record[field], where, field)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Location and text of every line that is not blank; .gz is unpacked."""
    opener: Callable[[Path], Iterable[bytes]] = _unpacked if _suffix(path).endswith(".gz") else _raw
    offset = 0
    for number, line in enumerate(opener(path), start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}:{number}", offset + error.start) from error
        offset += len(line)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if text and not text.isspace():
            yield f"{path}:{number}", text


def _raw(path: Path) -> Iterator[bytes]:
    with _reading(path), path.open("rb") as stream:
        yield from stream


def _unpacked(path: Path) -> Iterator[bytes]:
    with _reading(path), gzip.open(path, "rb") as stream:
        try:
            yield from stream
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UsageError(f"{path}: is not a whole gzip file ({error}); make it or fetch it again") from error


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path}: Parquet needs the package pyarrow (the extra `parquet`); install it") from error
    row = 0
    try:
        with parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                raise _no_field(path, field, table.schema_arrow.names)
            for group in range(table.num_row_groups):  # one call for all groups would keep all of them in memory
                for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=[field]):
                    for value in batch.column(field):
                        row += 1
                        yield _checked(value.as_py(), f"{path}, row {row}", field)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, row {row}: is not UTF-8 text ({error}); convert it to UTF-8") from error
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: is not a whole Parquet file ({error}); make it or fetch it again") from error


def _checked(value: object, where: str, field: str) -> str:
    """A record's text. JSON can spell half a surrogate pair, which is no text: UTF-8 cannot hold it."""
    if not isinstance(value, str):
        raise UsageError(f"{where}: field {field!r} is {type(value).__name__}, not text; name another field")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: field {field!r} holds half a surrogate pair ({error}); repair the record"
        ) from error
    return value


def _no_field(where: object, field: str, fields: Iterable[str]) -> UsageError:
    return UsageError(
        f"{where}: there is no field {field!r}, only {', '.join(fields) or 'none'}; name the one with text"
    )


def _not_utf8(where: object, offset: int) -> UsageError:
    return UsageError(f"{where}: is not UTF-8 text (byte {offset}); convert it to UTF-8, or take it away")
