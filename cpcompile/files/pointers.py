"""Files that a repository holds elsewhere: a short text is in their place until they are fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cpcompile.core.errors import UsageError

POINTERS: Mapping[bytes, tuple[str, str]] = {
    b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}
"""How a pointer begins -> what wrote it, and the command that fetches the file."""
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
"""Weights in a folder of Hugging Face; the first kind that is there is read."""


def require_fetched(path: Path) -> None:
    """UsageError if `path` is a pointer; a file that cannot be read is left to the code that opens it."""
    try:
        with path.open("rb") as file:
            head = file.read(max(map(len, POINTERS)))
    except OSError:
        return
    for start, (tool, command) in POINTERS.items():
        if head.startswith(start):
            raise UsageError(f"{path}: is a pointer of {tool}, not the file itself; run `{command}` in its repository")


def require_fetched_model(folder: Path) -> None:
    """UsageError if something that is read of a Hugging Face folder is a pointer; other files there may be pointers."""
    weights = next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    for path in (*folder.glob("*.json"), *folder.glob("tokenizer.model"), *weights):
        if path.is_file():
            require_fetched(path)
