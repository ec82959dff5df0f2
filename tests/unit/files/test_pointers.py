"""Pointers of Git LFS and git-annex, wherever a file of the user is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpcompile.bundle.manifest import read_json, verify_file
from cpcompile.cli.settings import load_toml
from cpcompile.core.errors import UsageError
from cpcompile.files.arrays import load_inputs
from cpcompile.files.pointers import require_fetched, require_fetched_model
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.frontend.program_archive import inspect_program
from cpcompile.report import read_report
from cpcompile.text.tokenization import read_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.pt", load_checkpoint),
        ("model.pt2", inspect_program),
        ("batch.npz", lambda path: load_inputs(path, path)),
        ("report.json", read_report),
        ("cpcompile.toml", load_toml),
        ("manifest.json", read_json),
        ("weights.bin", lambda path: verify_file(path, "0" * 64)),
        ("tokenizer.json", lambda path: read_tokenizer(path, 1000)),
    ],
)
def test_every_reader_says_how_to_fetch_it(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    path = tmp_path / name
    path.write_text(POINTER)
    with pytest.raises(UsageError, match=rf"{name}: is a pointer of Git LFS, not the file itself; run `git lfs pull`"):
        read(path)


def test_other_files_and_none_pass(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("version 1")
    for name in ("empty", "text", "missing", "."):
        require_fetched(tmp_path / name)


@pytest.mark.parametrize(
    ("whole", "pointers", "refused"),
    [
        (["config.json", "model.safetensors"], ["pytorch_model.bin", "onnx/model.onnx"], None),
        (["config.json"], ["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["config.json"], ["pytorch_model.bin"], "pytorch_model.bin"),
        (["config.json", "model-1-of-2.safetensors"], ["model-2-of-2.safetensors"], "model-2-of-2.safetensors"),
        (["config.json", "model.safetensors"], ["tokenizer.json"], "tokenizer.json"),
        ([], ["model.gguf"], "model.gguf"),
    ],
)
def test_of_a_hugging_face_folder_what_is_read_counts(
    tmp_path: Path, whole: list[str], pointers: list[str], refused: str | None
) -> None:
    for name, text in [*((name, "{}") for name in whole), *((name, POINTER) for name in pointers)]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if refused is None:
        require_fetched_model(tmp_path)
        return
    with pytest.raises(UsageError, match=rf"{refused}: is a pointer of Git LFS"):
        require_fetched_model(tmp_path)
