"""A small checkpoint with its dense baseline, and a bundle of real engines.

The engines are the captured graph with the context bound and nothing removed: what the
validator has to judge does not depend on how much smaller they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from cpcompile.bundle.reader import Bundle, open_bundle
from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.config import ModelConfig, ValidateConfig
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.exporters.onnxruntime_exporter import export_onnxruntime
from cpcompile.frontend.capture import capture
from cpcompile.frontend.checkpoint import Checkpoint, save_checkpoint
from cpcompile.models.decoder import Decoder
from cpcompile.validation.language_reference import LanguageReference

CONTEXTS = ("de", "en")
CONFIG = ModelConfig(vocabulary=64, width=32, layers=2, heads=4, kv_heads=2, ffn=64, align=16)
KEPT = {
    UnitKind.FFN: np.array([[[1, 1, 0, 0], [1, 0, 1, 0]], [[1, 0, 0, 1], [0, 1, 1, 0]]], dtype=np.bool_),
    UnitKind.HEAD: np.array([[[1, 0], [1, 1]], [[1, 1], [0, 1]]], dtype=np.bool_),
}

SHAPES = ((1, 1), (1, 16), (3, 8))

MakeBundle = Callable[..., Bundle]


def _spread(model: Decoder) -> Decoder:
    """Larger weights: freshly initialised ones give every token nearly the same logit."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="session")
def held_out() -> Mapping[str, npt.NDArray[np.int32]]:
    rng = np.random.default_rng(5)
    return {context: rng.integers(64, size=300, dtype=np.int32) for context in CONTEXTS}


@pytest.fixture(scope="session")
def dense(held_out: Mapping[str, npt.NDArray[np.int32]]) -> Checkpoint:
    torch.manual_seed(3)
    model = _spread(Decoder(CONFIG))
    return Checkpoint(
        config=CONFIG,
        state=model.state_dict(),
        contexts=CONTEXTS,
        tokenizer=Tokenizer(BPE()).to_str(),
        held_out=dict(held_out),
    )


@pytest.fixture(scope="session")
def checkpoint(dense: Checkpoint) -> Checkpoint:
    selection = Selection(CONTEXTS, KEPT)
    model = Decoder(CONFIG, contexts=len(CONTEXTS))
    model.load_state_dict(dict(dense.state), strict=False)
    model.select(selection)
    return Checkpoint(
        config=CONFIG,
        state=model.state_dict(),
        contexts=CONTEXTS,
        tokenizer=Tokenizer(BPE()).to_str(),
        selection=selection,
    )


@pytest.fixture(scope="session")
def reference(checkpoint: Checkpoint, held_out: Mapping[str, npt.NDArray[np.int32]]) -> LanguageReference:
    return LanguageReference(checkpoint, None, ValidateConfig(shapes=SHAPES), held_out=held_out, sequence=16)


@pytest.fixture(scope="session")
def captured(checkpoint: Checkpoint) -> ir.Model:
    return capture(checkpoint.model)


@pytest.fixture(scope="session")
def make_bundle(captured: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """make_bundle(change=None, contexts=…): a bundle whose graphs went through `change(graph)`."""

    def make(change: Callable[[ir.Graph], None] | None = None, contexts: Mapping[str, int] | None = None) -> Bundle:
        folder = tmp_path_factory.mktemp("bundle") / "model.cpc"
        with BundleWriter(folder) as writer:
            for name, index in (contexts or {"de": 0, "en": 1}).items():
                model = _bind(captured.clone(), index)
                if change:
                    change(model.graph)
                artifact = export_onnxruntime(model, writer.folder(name, "cpu-fp32"), weights=None, locations={})
                writer.add_variant(name, artifact, weights=None)
            counts = {"total": 5, "kept": 3, "removed": 2, "removed_by_kind": {"ffn": 2}, "removed_experts": {}}
            parameters = dict.fromkeys(contexts or CONTEXTS, counts)
            tokenizer = {
                "tokenizers": dict.fromkeys(contexts or CONTEXTS, f"sha256:{'0' * 64}"),
                "shared_weights": False,
                "checkpoint": "0" * 64,
            }
            writer.seal(name="test", metadata=tokenizer | {"parameters": parameters})
            return open_bundle(writer.commit())

    return make


@pytest.fixture(scope="session")
def bundle(make_bundle: MakeBundle) -> Bundle:
    return make_bundle()


@pytest.fixture(scope="session")
def dense_path(dense: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "model.dense.pt"
    save_checkpoint(dense, path)
    return path


def _bind(model: ir.Model, index: int) -> ir.Model:
    """Turn the input `context` into a constant."""
    graph = model.graph
    (value,) = (v for v in graph.inputs if v.name == "context")
    graph.inputs.remove(value)
    value.const_value = ir.tensor(np.array(index, dtype=np.int64), name="context")
    graph.register_initializer(value)
    return model
