"""A bundle of small models with random weights, for the C++ library and for Python to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.config import BuildConfig, preset
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.frontend.checkpoint import Checkpoint, save_checkpoint
from cpcompile.frontend.source import open_source
from cpcompile.models.decoder import Decoder
from cpcompile.pipeline.build import freeze_contexts
from cpcompile.pipeline.stored_weights import wholes
from cpcompile.pipeline.write_engines import export_added, export_engines
from cpcompile.targets.requests import parse_targets
from cpcompile.text.tokenization import train_tokenizer
from tests.conftest import Once

CONTEXTS = ("cpp", "english", "python")


def write_checkpoint(path: Path) -> None:
    """A model whose contexts keep different units."""
    torch.manual_seed(11)
    config, generator = preset("nano"), np.random.default_rng(11)
    kept = {
        UnitKind.FFN: generator.random((len(CONTEXTS), config.layers, config.ffn // config.align)) < 0.4,
        UnitKind.HEAD: generator.random((len(CONTEXTS), config.layers, config.kv_heads)) < 0.7,
    }
    for units in kept.values():
        units[..., 0] = True
    selection = Selection(CONTEXTS, kept)
    model = Decoder(config, contexts=len(CONTEXTS))
    model.select(selection)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # fresh weights give every token nearly the same logit
    texts = [source.read_text(encoding="utf-8") for source in sorted(Path(__file__).parents[1].glob("*.py"))]
    tokenizer = train_tokenizer(texts, config.vocabulary).to_str()
    state = model.state_dict()
    save_checkpoint(
        Checkpoint(config=config, state=state, contexts=CONTEXTS, tokenizer=tokenizer, selection=selection), path
    )


def write_bundle(folder: Path) -> None:
    """What `build --merged --target cpu --target openvino` writes, without validation, which takes most of its time."""
    write_checkpoint(folder / "model.pt")
    config, source = BuildConfig(merged=True), open_source(folder / "model.pt")
    dynamic = source.capture(opset=config.opset)
    frozen, accounts = freeze_contexts(source, dynamic, CONTEXTS, {}, None, lambda: None)
    parameters = wholes(dynamic, frozen, accounts)
    added = parse_targets(("cpu", "openvino"), ("int8", "int4-weights", "fp32"), ())
    with BundleWriter(folder / "model.cpc") as writer:
        metadata = export_engines(
            writer, dynamic, frozen, parameters, accounts, source, {}, config, lambda: None, added
        )
        export_added(writer, frozen, parameters, added, config, None, lambda *_: None)
        writer.seal(name="model", metadata=metadata)
        writer.commit(failed=False)


@pytest.fixture(scope="session")
def bundle(once: Once) -> Path:
    """An engine for each context, and one for all; nobody may change it."""
    return once("cpp", write_bundle) / "model.cpc"
