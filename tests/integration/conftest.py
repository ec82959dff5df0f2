"""What the commands' tests share: a bundle with everything measured, and the graphs of decoders that were exported."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from cpcompile.cli import main
from cpcompile.models.decoder import Decoder
from cpcompile.validation import coherence
from tests.conftest import Once


@pytest.fixture(scope="session")
def measured(trained: Path, once: Once) -> Path:
    """model.pt, model.dense.pt and model.cpc, a bundle with everything measured, in a folder that nobody may change.

    Its quality after 24 steps is no matter: the verdict may be fail.
    """

    def make(folder: Path) -> None:
        for name in ("model.pt", "model.dense.pt"):
            shutil.copy(trained.with_name(name), folder / name)
        with short_continuations():
            result = CliRunner().invoke(main, ["build", str(folder / "model.pt"), "--json", "--rounds", "4"])
        assert result.exit_code in (0, 1), result.output
        if (failed := folder / "model.cpc.failed").exists():
            failed.rename(folder / "model.cpc")

    return once("measured", make)


@contextmanager
def short_continuations() -> Iterator[None]:
    """The coherence of a few tokens takes as much code as that of many, and a fifth of the time of a build less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coherence, "PROMPTS", 4)
        patch.setattr(coherence, "NEW_TOKENS", 4)
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_coherence() -> Iterator[None]:
    with short_continuations():
        yield


@pytest.fixture(scope="session", autouse=True)
def exported_once() -> Iterator[None]:
    """The export of a decoder takes most of a build's time: the same weights are exported once to each opset.

    Commands that run in processes of their own export for themselves.
    """
    export, known = torch.onnx.export, {}

    def remembered(model: torch.nn.Module, arguments: Any, **options: Any) -> Any:
        if not isinstance(model, Decoder):
            return export(model, arguments, **options)
        digest = hashlib.sha256(f"{model.config}\n{model.contexts}\n{options}\n".encode())
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
        key = digest.digest()
        if key not in known:
            program = known[key] = export(model, arguments, **options)
            for name, value in program.model.graph.initializers.items():
                if value.const_value is not None:  # the model's own tensors may change
                    value.const_value = ir.tensor(value.const_value.numpy().copy(), name=name)
        program = known[key]
        return SimpleNamespace(model=program.model.clone(), exported_program=program.exported_program)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", remembered)
        yield
