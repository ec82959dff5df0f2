"""Real text already on your machine: a corpus of three contexts without a download.

    python    sources of the standard library
    cpp       the C++ headers in torch
    english   prose of docstrings, and the topics of `help()`

The files are read where they are installed, and copied to a folder that the user chooses.
"""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from cpcompile.core.errors import CpcompileError

Document = tuple[str, str]
"""Name and text."""


def write_installed_corpus(folder: Path, *, bytes_per_context: int = 3_000_000) -> Path:
    """Write about `bytes_per_context` of text per context to `folder`, one file per document; returns `folder`."""
    sources: dict[str, Callable[[], Iterable[Document]]] = {
        "python": _python_sources,
        "cpp": _cpp_headers,
        "english": _english_prose,
    }
    for context, documents in sources.items():
        written = 0
        target = folder / context
        target.mkdir(parents=True, exist_ok=True)
        for number, (name, text) in enumerate(documents()):
            (target / f"{number:04d}-{name}.txt").write_text(text, encoding="utf-8")
            written += len(text.encode())
            if written >= bytes_per_context:
                break
        if written < bytes_per_context // 10:
            raise CpcompileError(
                f"{context}: this installation has only {written:,} bytes of such text, too little to train on; "
                "train on text of your own with `cpcompile train --data DIR`"
            )
    return folder


def _python_sources() -> Iterator[Document]:
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(library.glob("*.py")) + sorted(library.glob("*/*.py"))
    skipped = {"test", "idlelib", "lib2to3", "site-packages", "pydoc_data", "encodings", "turtledemo"}
    for path in _spread([p for p in paths if p.parent.name not in skipped and _of_common_size(p)]):
        if text := _read(path):
            yield path.stem, text


def _cpp_headers() -> Iterator[Document]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CpcompileError("torch is not installed; the demo reads the C++ headers that it brings along")
    include = Path(spec.origin).parent / "include"
    # Generated headers (one declaration per operator) repeat themselves thousands of times.
    paths = [p for p in sorted(include.rglob("*.h")) if "ops" not in p.parts and _of_common_size(p)]
    for path in _spread(paths):
        if text := _read(path):
            yield path.stem, text


def _english_prose() -> Iterator[Document]:
    for name, text in sorted(topics.items()):
        yield name, _prose(text)
    site = Path(sysconfig.get_path("purelib"))
    library = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts and "test" not in p.parts]
    for package in ("torch", "numpy", "onnx"):
        paths += sorted((site / package).rglob("*.py"))
    for path in _spread(paths):
        text = _prose("\n\n".join(_docstrings(_read(path))))
        if len(text) > 500:
            yield path.stem, text


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 80:
                yield docstring


def _prose(text: str) -> str:
    """The paragraphs of `text` that read like sentences rather than like code or tables."""
    kept = []
    for paragraph in text.split("\n\n"):
        letters = sum(ch.isalpha() or ch == " " for ch in paragraph)
        indented = all(line.startswith("    ") for line in paragraph.splitlines() if line)
        if ">>>" not in paragraph and not indented and len(paragraph) > 60 and letters > 0.85 * len(paragraph):
            kept.append(paragraph.strip())
    return "\n\n".join(kept) + "\n"


def _spread(paths: list[Path]) -> list[Path]:
    """The same paths in an order that takes from everywhere first: 0, 7, 14, …, 1, 8, …."""
    return [path for offset in range(7) for path in paths[offset::7]]


def _of_common_size(path: Path) -> bool:
    """Whether a file is neither a stub nor so long that it would dominate its context."""
    return 2_000 < path.stat().st_size < 60_000


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
