"""Encoders with a position bias: exportable only with eager attention, which `prepare_hugging_face` chooses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpcompile.core.selection import UnitKind
from cpcompile.partitioning import partition
from cpcompile.partitioning.hugging_face import load_hugging_face, text_encoder
from tests.unit.partitioning.models import capture_partitioned
from tests.unit.passes.graph_text import run

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")


@pytest.mark.parametrize(
    "family", [pytest.param("MT5", marks=pytest.mark.slow), pytest.param("UMT5", marks=pytest.mark.slow)]
)
def test_an_encoder_is_read_partitioned_and_captured(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    )
    getattr(transformers, f"{family}EncoderModel")(config).save_pretrained(tmp_path)
    ready = load_hugging_face(tmp_path)
    assert ready.forward is text_encoder
    assert ready.model.config._attn_implementation == "eager"
    module = partition(
        ready.model, ready.example_inputs, forward=ready.forward, dynamic_shapes=ready.dynamic_shapes, align=8
    )
    assert {group.kind for group in module.groups} == {UnitKind.FFN, UnitKind.HEAD}
    ids, mask = torch.randint(0, 64, (3, 5)), torch.ones(3, 5, dtype=torch.int64)
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "context": torch.tensor(0).numpy()}
    (output,) = run(capture_partitioned(module), feeds).values()
    with torch.no_grad():
        expected = module(ids, mask, context=torch.tensor(0))
    assert torch.allclose(torch.from_numpy(output), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
