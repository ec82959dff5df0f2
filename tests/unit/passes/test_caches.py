"""The cache of a context: as many heads as it keeps, the same logits with and without, and none where it is removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from cpcompile.bundle.reader import Variant
from cpcompile.core.cache import INPUT, KEEP, MASK, OUTPUT, PAST, POSITIONS, complete, present_of
from cpcompile.core.config import PretrainedConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.core.types import Array
from cpcompile.frontend.capture import capture
from cpcompile.models.language_model import LanguageModel
from cpcompile.partitioning.pretrained import PretrainedDecoder
from cpcompile.passes.cache_interface import input_shapes
from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels
from cpcompile.passes.equal_caches import with_equal_caches
from cpcompile.passes.freeze import freeze
from cpcompile.passes.merge_contexts import merge_contexts
from cpcompile.passes.remove_cache import RemoveCache
from cpcompile.pipeline.cpu_engines import fused_for_cpu
from cpcompile.runtime.decoding import decode
from cpcompile.runtime.engine import Engine, create_session, session_options
from cpcompile.runtime.sampling import Sampling
from tests.unit.passes.decoders import CONTEXTS, FORMS, dynamic_graph, random_decoder, random_selection
from tests.unit.passes.graph_text import check, parse

TOLERANCE = 1e-5
"""Of the largest logit; measured: below 2e-6."""


def opened(model: ir.Model) -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def step(session: ort.InferenceSession, feeds: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Logits, and the cache as inputs of the next step."""
    inputs = {each.name: each.shape for each in session.get_inputs()}
    names = [each.name for each in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, complete(feeds, inputs)), strict=True))
    past = {name: outputs[present] for name in inputs if (present := present_of(name)) is not None}
    return outputs[OUTPUT], past


def eager(model: LanguageModel, ids: Array, context: int) -> Array:
    with torch.inference_mode():
        return model(torch.from_numpy(ids), torch.tensor(context)).numpy()


def assert_close(got: Array, expected: Array) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(("opset", "kv_heads"), FORMS)
def test_a_context_has_the_cache_of_the_heads_that_it_keeps(opset: int, kv_heads: int) -> None:
    model = random_decoder(kv_heads, 1)
    selection = random_selection(model, 1)
    model.select(selection)
    dynamic = dynamic_graph(model, opset, cached=True)
    ids = np.random.default_rng(0).integers(0, 512, (2, 9))
    for index in range(len(CONTEXTS)):
        frozen = freeze(dynamic, index).model
        check(frozen)
        heads = selection.kept[UnitKind.HEAD][index].sum(-1)
        shapes = {name: shape for name, shape in input_shapes(frozen.graph).items() if PAST.fullmatch(name)}
        assert shapes == {
            f"past_key_values.{layer}.{part}": ["batch", number, "past", model.config.head_dim]
            for layer, number in enumerate(heads.tolist())
            for part in ("key", "value")
            if number
        }
        session = opened(frozen)
        expected = eager(model, ids, index)
        logits, cache = step(session, {INPUT: ids[:, :4]})
        assert_close(logits, expected[:, :4])
        logits, cache = step(session, {INPUT: ids[:, 4:8], **cache})
        assert_close(logits, expected[:, 4:8])
        logits, _ = step(session, {INPUT: ids[:, 8:], **cache, KEEP: np.array(1)})
        assert_close(logits, expected[:, 8:])
        assert_close(step(session, {INPUT: ids, KEEP: np.array(2)})[0], expected[:, 7:])


def test_prompts_of_different_lengths_are_as_each_alone() -> None:
    model = random_decoder(2, 3)
    session = opened(freeze(dynamic_graph(model, 23, cached=True), 0).model)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 512, length) for length in (7, 3, 5)]
    mask = np.array([[0] * (7 - len(each)) + [1] * len(each) for each in prompts])
    ids = np.stack([np.concatenate([np.zeros(7 - len(each), np.int64), each]) for each in prompts])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    logits, cache = step(session, {INPUT: ids, MASK: mask, POSITIONS: positions})
    following = rng.integers(0, 512, (3, 1))
    feeds = {INPUT: following, MASK: np.c_[mask, [1, 1, 1]], POSITIONS: positions[:, -1:] + 1, **cache}
    after, _ = step(session, feeds)
    assert np.isfinite(logits).all()
    for row, prompt in enumerate(prompts):
        expected = eager(model, np.concatenate([prompt, following[row]])[None], 0)
        assert_close(logits[row : row + 1, -len(prompt) :], expected[:, :-1])
        assert_close(after[row : row + 1], expected[:, -1:])


@pytest.mark.parametrize(("opset", "kv_heads"), FORMS)
def test_without_its_cache_a_graph_reads_whole_texts(opset: int, kv_heads: int) -> None:
    model = random_decoder(kv_heads, 2)
    model.select(random_selection(model, 2))
    ids = np.random.default_rng(0).integers(0, 512, (2, 9))
    for index in range(len(CONTEXTS)):
        frozen = freeze(dynamic_graph(model, opset, cached=True), index).model
        assert RemoveCache()(frozen).modified and not RemoveCache()(frozen).modified
        onnx.checker.check_model(ir.to_proto(frozen), full_check=True)
        assert list(input_shapes(frozen.graph)) == [INPUT] and [v.name for v in frozen.graph.outputs] == [OUTPUT]
        (logits,) = opened(frozen).run(None, {INPUT: ids})
        assert_close(logits, eager(model, ids, index))


SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
WINDOW = {**SMALL, "sliding_window": 4}
KINDS = {**WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
PRETRAINED: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gpt2": {**GPT2, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": WINDOW,
    "gemma3_text": KINDS,
    "qwen3": {**SMALL, "head_dim": 16},
    "phi3": SMALL,
}


def pretrained(kind: str) -> PretrainedDecoder:
    """With random weights; context 0 keeps one head of layer 1 and none of layer 0."""
    torch.manual_seed(0)
    model = PretrainedDecoder(PretrainedConfig(settings={"model_type": kind, **PRETRAINED[kind]}), contexts=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in model.gate_tables():
                parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    kept = {each.kind: np.ones((2, each.layers, each.count), dtype=np.bool_) for each in model.units()}
    kept[UnitKind.HEAD][0] = False
    kept[UnitKind.HEAD][0, 1, 0] = True
    model.select(Selection(("a", "b"), kept))
    return model


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in PRETRAINED if k != "llama")]
)
def test_pretrained_models_have_caches(kind: str) -> None:
    """Text is longer than the windows; layers have masks of their own kind."""
    model = pretrained(kind)
    dynamic = capture(model, cached=True)
    ids = np.random.default_rng(0).integers(3, 96, (2, 11))
    caches = model.caches()
    assert caches is not None
    for index, heads in enumerate(([0, 1], [each.heads for each in caches])):
        frozen = freeze(dynamic, index).model
        shapes = {name: shape for name, shape in input_shapes(frozen.graph).items() if PAST.fullmatch(name)}
        assert [shape[1] for shape in shapes.values()] == [n for n in heads for _ in ("key", "value") if n]
        for node in (each for each in frozen.graph if each.op_type == "Attention"):
            assert all(value in frozen.graph.outputs for value in node.inputs[1:3]), "a copy of the cache"
        expected = eager(model, ids, index)
        fused = fused_for_cpu(frozen)
        operators = Counter(node.op_type for node in fused.graph)
        layers = sum(map(bool, heads))
        assert operators["GroupQueryAttention"] == layers and "Attention" not in operators
        assert operators["RotaryEmbedding"] == (0 if kind == "gpt2" else 2 * layers)
        for graph, rows in ((frozen, 2), (fused, 1)):  # its operator takes several tokens after a cache from one text
            session = opened(graph)
            logits, cache = step(session, {INPUT: ids[:rows, :6]})
            assert_close(logits, expected[:rows, :6])
            after, _ = step(session, {INPUT: ids[:rows, 6:], **cache, KEEP: np.array(2)})
            assert_close(after, expected[:rows, -2:])


@pytest.mark.parametrize(("opset", "kv_heads"), FORMS)
def test_a_merged_graph_has_the_heads_of_the_context_with_the_most(opset: int, kv_heads: int) -> None:
    model = random_decoder(kv_heads, 1)
    selection = random_selection(model, 1)
    model.select(selection)
    dynamic = dynamic_graph(model, opset, cached=True)
    frozen = {context: freeze(dynamic, index).model for index, context in enumerate(CONTEXTS)}
    before = [each.graph.name for each in frozen.values()], [ir.to_proto(each) for each in frozen.values()]
    merged = merge_contexts(with_equal_caches(frozen))
    assert before == ([each.graph.name for each in frozen.values()], [ir.to_proto(each) for each in frozen.values()])
    check(merged)
    most = selection.kept[UnitKind.HEAD].sum(-1).max(0).tolist()
    assert {name: shape[1] for name, shape in input_shapes(merged.graph).items() if PAST.fullmatch(name)} == {
        f"past_key_values.{layer}.{part}": number
        for layer, number in enumerate(most)
        for part in ("key", "value")
        if number
    }
    session = opened(merged)
    ids = np.random.default_rng(0).integers(0, 512, (2, 9))
    for index in range(len(CONTEXTS)):
        expected, number = eager(model, ids, index), {"context": np.array(index)}
        logits, cache = step(session, {INPUT: ids[:, :6], **number})
        assert_close(logits, expected[:, :6])
        logits, cache = step(session, {INPUT: ids[:, 6:8], **cache, **number})
        assert_close(logits, expected[:, 6:8])
        logits, _ = step(session, {INPUT: ids[:, 8:], **cache, **number, KEEP: np.array(1)})
        assert_close(logits, expected[:, 8:])


@pytest.fixture(name="engines")
def with_and_without_cache(tmp_path: Path) -> dict[str, Engine]:
    """Of one context: its cache joined anew for every token, written in place, and none."""
    model = random_decoder(2, 3)
    model.select(random_selection(model, 3))
    frozen, whole = (freeze(dynamic_graph(model, 23, cached=cached), 1).model for cached in (True, False))
    engines = {}
    for name, graph in {"joined": frozen, "in place": fused_for_cpu(frozen), "none": whole}.items():
        path = tmp_path / f"{name}.onnx"
        ir.save(graph, path)
        variant = Variant(
            context="b",
            name="cpu-fp32",
            runtime="onnxruntime",
            precision="fp32",
            provider="CPUExecutionProvider",
            model=path,
            weights=None,
            session_options={},
            provider_options={},
            feeds={},
            bytes=path.stat().st_size,
        )
        engines[name] = Engine(variant, create_session(variant, session_options(variant, threads=1)), 512)
    return engines


def test_an_engine_generates_with_its_cache_what_it_generates_without(engines: dict[str, Engine]) -> None:
    joined, in_place, without = engines.values()
    assert [each.writes_in_place for each in engines.values()] == [False, True, False]
    prompt = np.random.default_rng(2).integers(0, 512, 5)
    for temperature in (0.0, 1.0):
        texts = [list(each.generate(prompt, tokens=12, temperature=temperature, seed=4)) for each in engines.values()]
        assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 3
    ids = np.random.default_rng(5).integers(0, 512, (3, 8))
    for engine in (joined, in_place):
        assert engine.outputs({INPUT: prompt[None]}).keys() == {OUTPUT}
        assert_close(engine.run(ids), without.run(ids))
        _, cache = engine.step(ids[:, :3])
        for keep in (0, 2):  # several tokens of several texts after a cache, twice after the same
            logits, after = engine.step(ids[:, 3:7], cache, logits_to_keep=keep)
            assert_close(logits, without.run(ids)[:, 7 - (keep or 4) : 7])
        assert_close(engine.step(ids[:, 7:], after)[0], without.run(ids)[:, 7:])
        some = dict(list(cache.items())[:1])
        short = cache | {name: array[:, :, :1] for name, array in some.items()}
        for wrong, says in (
            (some, "is not of this engine"),
            ([1], "is not of this engine"),
            (short, r"\(3, 1\), \(3, 3\)"),
        ):
            with pytest.raises(UsageError, match=says):
                engine.step(ids[:, 3:4], wrong)
        (name, part), *_ = cache.items()
        for feeds, says in (
            ({INPUT: ids[:, 3:4], name: part}, "is not of this engine"),
            (
                {INPUT: ids[:, 3:4], **cache, MASK: np.ones((3, 3), int)},
                "covers 3 tokens; the cache has 3 and input_ids 1",
            ),
            ({INPUT: ids[:, 3:4], MASK: np.ones((3, 4), int)}, "the cache has 0 and input_ids 1, so 1 are needed"),
        ):
            with pytest.raises(UsageError, match=says):
                engine.outputs(feeds)
        with pytest.raises(UsageError, match=r"has 2 rows, the cache \(texts, tokens\) \(3, 3\)"):
            engine.step(ids[:2, 3:5], cache)
        with pytest.raises(UsageError, match="is float64; float32 is needed|has the shape"):
            engine.step(ids[:, 3:4], {name: array[..., :1] for name, array in cache.items()})
        with pytest.raises(UsageError, match="logits_to_keep is -1: it cannot be negative"):
            engine.step(ids, logits_to_keep=-1)
        with pytest.raises(UsageError, match="logits_to_keep is 1.5"):
            engine.step(ids, logits_to_keep=1.5)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"has the shape \(0, 3\) and holds no token"):
            engine.outputs({INPUT: np.zeros((0, 3), int)})
        with pytest.raises(UsageError, match="needs its inputs by name, input_ids; given: nothing"):
            engine.outputs({})
    with pytest.raises(UsageError, match="has no cache; use `run`"):
        without.step(ids)


def test_a_cache_in_place_grows_when_it_is_full(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpcompile.runtime.cache_buffers.AHEAD", 3)
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    texts = [list(decode(engines[name], prompts, tokens=12, sampling=Sampling())) for name in ("in place", "joined")]
    assert texts[0] == texts[1] and len(texts[0]) == 12


def test_caches_of_other_files_are_an_interface_like_any_other() -> None:
    """Only freezing knows that whoever runs the engine reads the shapes of the cache from it."""
    text = """(float[N,S,4] x, float[N,2,P,2] past) => (float[N,S,4] y, float[N,2,T,2] present) {
        h = MatMul(x, w) g = Mul(h, gate) y = MatMul(g, v) r = Reshape(h, to) k = Transpose<perm = [0, 2, 1, 3]>(r)
        present = Concat<axis = 2>(past, k) }"""
    weights = {"w": (4, 4), "v": (4, 4), "gate": np.array([1, 1, 0, 0.0]), "to": np.array([0, 0, 2, 2])}
    for cut, left in ((False, 2), (True, 1)):
        model = parse(text, weights)
        model.graph.inputs[1].name, model.graph.outputs[1].name = "past_key_values.0.key", "present.0.key"
        EliminateDeadChannels(cut_caches=cut)(model)
        assert [str(value.shape) for value in (model.graph.inputs[1], model.graph.outputs[1])] == [
            f"[N,{left},P,2]",
            f"[N,{left},T,2]",
        ]
