"""ONNX Runtime GenAI runs exported folders: the same greedy tokens as our runtime and as the eager model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime_genai as og
import pytest

from cpcompile.core.cache import INPUT, KEEP, OUTPUT
from cpcompile.core.generation import GenerationSettings
from cpcompile.exporters.genai_exporter import genai_config
from cpcompile.frontend.capture import capture
from cpcompile.passes.freeze import freeze
from cpcompile.pipeline.cpu_engines import fused_for_cpu
from tests.unit.exporters.genai import assert_likeliest, exported, generate
from tests.unit.passes.decoders import CONTEXTS, dynamic_graph, random_decoder, random_selection
from tests.unit.passes.test_caches import eager, opened, pretrained, step

SETTINGS = GenerationSettings(end=(2,), context_length=64)


def greedy(graph: ir.Model, prompt: list[int], tokens: int) -> list[int]:
    """What our engines generate: the cache goes from step to step, until a token ends the text."""
    session, text, cache = opened(graph), list(prompt), {}
    for _ in range(tokens):
        new = text if not cache else text[-1:]
        logits, cache = step(session, {INPUT: np.array([new]), **cache, KEEP: np.array(1)})
        text.append(int(logits[0, -1].argmax()))
        if text[-1] in SETTINGS.end:
            return text[len(prompt) : -1]
    return text[len(prompt) :]


@pytest.mark.parametrize("finish", [ir.Model.clone, fused_for_cpu])
def test_contexts_side_by_side_share_a_weights_file(finish: Callable[[ir.Model], ir.Model], tmp_path: Path) -> None:
    """Context a has no cache in layer 0, and c has none at all."""
    model = random_decoder(2, 4)
    model.select(random_selection(model, 4))
    dynamic = dynamic_graph(model, 23, cached=True)
    frozen = {name: finish(freeze(dynamic, index).model) for index, name in enumerate(CONTEXTS)}
    expected = {name: greedy(graph, [5, 6, 7], 40) for name, graph in frozen.items()}
    folders = exported(frozen, tmp_path / "all", SETTINGS)
    assert {name: path.relative_to(tmp_path) for name, path in folders.items()} == {
        name: Path("all", name) for name in CONTEXTS
    }
    (weights,) = (tmp_path / "all").rglob("*.bin")
    assert weights == tmp_path / "all" / "weights.bin"
    alone = exported({"a": finish(freeze(dynamic, 0).model)}, tmp_path / "one", SETTINGS)
    assert alone == {"a": tmp_path / "one"}
    own = (tmp_path / "one" / "weights.bin").stat().st_size
    assert own < weights.stat().st_size < 3 * own  # the embedding is stored once
    for index, (name, folder) in enumerate(folders.items()):
        run = og.Model(str(folder))
        (got,) = generate(run, [[5, 6, 7]], 40)
        assert got == expected[name]
        assert_likeliest([5, 6, 7], got, lambda text, index=index: eager(model, np.array([text]), index)[0, -1])
        prompts = [[9], list(range(20, 31)), [7, 8, 9, 10]]
        batch = generate(run, prompts, 20)
        for prompt, row in zip(prompts, batch, strict=True):
            (single,) = generate(run, [prompt], 20)
            assert row[: len(single)] == single
    assert generate(og.Model(str(alone["a"])), [[5, 6, 7]], 40) == [expected["a"]]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "gpt2", "gemma3_text", "qwen3")]
)
def test_pretrained_models_run(kind: str, tmp_path: Path) -> None:
    """Context 0 has one head in layer 1 and no cache in layer 0."""
    model = pretrained(kind)
    dynamic = capture(model, cached=True)
    frozen = {name: fused_for_cpu(freeze(dynamic, index).model) for index, name in enumerate(("a", "b"))}
    prompts = [[5, 6, 7], list(range(10, 30))]
    expected = {name: [greedy(graph, prompt, 30) for prompt in prompts] for name, graph in frozen.items()}
    folders = exported(frozen, tmp_path / "all", SETTINGS)
    for index, name in enumerate(frozen):
        run = og.Model(str(folders[name]))
        for prompt, tokens in zip(prompts, expected[name], strict=True):
            (got,) = generate(run, [prompt], 30)
            assert got == tokens
            assert_likeliest(prompt, got, lambda text, index=index: eager(model, np.array([text]), index)[0, -1])


def test_the_config_says_what_the_bundle_and_the_graph_say() -> None:
    model = random_decoder(2, 4)
    model.select(random_selection(model, 4))
    graph = freeze(dynamic_graph(model, 23, cached=True), 0).model
    settings = GenerationSettings(end=(3, 9), leading=(1, 4))
    config = genai_config(graph, settings, {"session.intra_op.allow_spinning": "0"})
    own, decoder = config["model"], config["model"]["decoder"]
    assert (own["vocab_size"], own["context_length"], own["bos_token_id"]) == (512, 1 << 17, 1)
    assert (own["eos_token_id"], own["pad_token_id"]) == ([3, 9], 3)
    assert decoder["session_options"]["session.intra_op.allow_spinning"] == "0"
    assert decoder["outputs"][OUTPUT] == OUTPUT and decoder["inputs"][INPUT] == INPUT
    assert config["search"]["max_length"] == 2048 and not config["search"]["past_present_share_buffer"]
    assert genai_config(fused_for_cpu(graph), settings, {})["search"]["past_present_share_buffer"]
    limited = genai_config(graph, GenerationSettings(end=(3,), context_length=64), {})
    assert (limited["model"]["context_length"], limited["search"]["max_length"]) == (64, 64)
    assert "bos_token_id" not in limited["model"] and json.dumps(limited)
