"""A model in llama.cpp, which llama-cpp-python brings, for the benchmarks that compare with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

CONTEXT = 2048
"""Tokens for which there is room."""


def require_llama_cpp() -> None:
    """click.UsageError if llama-cpp-python cannot be used."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError as error:
        raise click.UsageError(f"--gguf needs llama-cpp-python with all that it imports: {error}") from error


def open_gguf(gguf: Path, threads: int, *, all_logits: bool = False) -> Any:
    """A llama_cpp.Llama, whose `eval` goes on behind what it read. all_logits: `scores` has those of every token."""
    import llama_cpp

    return llama_cpp.Llama(
        str(gguf),
        n_ctx=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=all_logits,
        verbose=False,
    )


def files_of(gguf: Path, folder: Path) -> dict[str, Path]:
    """The model as the file has it and, in `folder`, in float32, by the names of these peers."""
    return {f"llama.cpp, {gguf.stem.rpartition('.')[2]}": gguf, "llama.cpp, F32": in_float32(gguf, folder)}


def in_float32(gguf: Path, folder: Path) -> Path:
    """The same weights as llama.cpp reads them, not quantised."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    path = folder / "float32.gguf"
    if llama_cpp.llama_model_quantize(str(gguf).encode(), str(path).encode(), options):
        raise click.ClickException(f"{gguf}: llama.cpp cannot convert it to float32")
    return path
