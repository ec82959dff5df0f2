"""Tiny Hugging Face models with random weights: partitioned, frozen, as small as the selection says, equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpcompile.core.errors import UsageError
from cpcompile.core.selection import UnitKind
from cpcompile.partitioning import partition
from tests.unit.partitioning.models import assert_freezes, random_selection, randomise

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
    ),
    "qwen3": (
        lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16)),
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
    ),
    "phi3": (  # fused projections, and a rotation that leaves out no channel: an empty slice
        lambda: transformers.Phi3ForCausalLM(
            transformers.Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64)
        ),
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ),
        "transformer.h.1.attn",
        "transformer.h.1.mlp",
    ),
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False),
        "encoder.layer.1.attention",
        "encoder.layer.1",
    ),
    "t5": (
        lambda: transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
        "encoder.block",  # one position bias for all layers ties their heads
        "encoder.block.1.layer.1.DenseReluDense",
    ),
    "vit": (
        lambda: transformers.ViTModel(
            transformers.ViTConfig(**(SMALL | {"image_size": 16, "patch_size": 4})), add_pooling_layer=False
        ),
        "layers.1.attention",
        "layers.1.mlp",
    ),
}


SOME = ("vit",)
"""Those that `make test` tries; test_pretrained has a llama."""


@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_partitioned_and_frozen(name: str) -> None:
    from cpcompile.partitioning.hugging_face import prepare_hugging_face

    make, attention, feed_forward = MODELS[name]
    ready = prepare_hugging_face(make())
    randomise(ready.model)
    module = partition(
        ready.model,
        ready.example_inputs,
        contexts=3,
        forward=ready.forward,
        dynamic_shapes=ready.dynamic_shapes,
        align=8,
    )
    groups = {group.name: group for group in module.groups}
    assert groups[attention].kind is UnitKind.HEAD
    assert groups[attention].units == (2 if name in ("llama", "qwen3", "phi3") else 4)
    assert groups[feed_forward].kind is UnitKind.FFN
    assert groups[feed_forward].units == (16 if name == "gpt2" else 8)
    assert len(groups) == (3 if name == "t5" else 4)
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        inputs: tuple[torch.Tensor, ...] = (torch.randn(3, 3, 16, 16, generator=generator),)
    else:
        mask = torch.ones(3, 11, dtype=torch.int64)
        mask[1, 8:] = 0
        inputs = (torch.randint(0, 64, (3, 11), generator=generator), mask)
    selection = random_selection(module)
    kept = assert_freezes(module, selection, inputs)
    total = sum(parameter.numel() for parameter in ready.model.parameters())
    assert all(sum(sizes.values()) < total for sizes in kept.values())


def test_a_folder_is_read_without_the_network(tmp_path: Path) -> None:
    from cpcompile.partitioning.hugging_face import language_model, load_hugging_face

    model = MODELS["llama"][0]().eval()
    model.save_pretrained(tmp_path)
    ready = load_hugging_face(tmp_path)
    assert ready.forward is language_model
    ids, mask = ready.example_inputs
    with torch.no_grad():
        assert torch.equal(ready.forward(ready.model, ids, mask), model(ids).logits)
    with pytest.raises(UsageError, match="there is no such folder; models are read from disk"):
        load_hugging_face(tmp_path / "absent")
    with pytest.raises(UsageError, match="is a file; give the folder that holds it"):
        load_hugging_face(tmp_path / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="cannot be read as a Hugging Face model"):
        load_hugging_face(tmp_path / "empty")


def test_folders_of_other_kinds_get_a_sentence(tmp_path: Path) -> None:
    from cpcompile.partitioning.hugging_face import load_hugging_face, prepare_hugging_face
    from cpcompile.partitioning.pretrained import read_pretrained

    small = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=64)
    ready = prepare_hugging_face(transformers.XLNetLMHeadModel(small))  # its longest sequence is -1
    assert ready.dynamic_shapes[0][1].max > 64
    bert = transformers.BertConfig(**SMALL)
    transformers.BertLMHeadModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        UsageError, match="BertLMHeadModel looks at the tokens that it predicts; a causal language model"
    ):
        read_pretrained(tmp_path / "bert")
    bert.is_decoder = True
    transformers.BertLMHeadModel(bert).save_pretrained(tmp_path / "decoder")
    assert read_pretrained(tmp_path / "decoder").config.settings["is_decoder"]
    t5 = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    transformers.T5Model(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(UsageError, match="T5Model: takes inputs of an encoder and a decoder, not only input_ids or"):
        load_hugging_face(tmp_path / "t5")
    (tmp_path / "decoder" / "config.json").write_text('{"model_type": "bert", "num_attention_heads": "four"}')
    with pytest.raises(UsageError, match="cannot be read as a Hugging Face model"):
        load_hugging_face(tmp_path / "decoder")
