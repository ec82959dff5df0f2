"""Models with a part of their vocabulary: before, expected, the logits of the kept ids, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from cpcompile.core.config import preset
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.frontend.capture import capture
from cpcompile.models.decoder import Decoder
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels, KeptChannels
from cpcompile.passes.freeze import freeze
from cpcompile.passes.share_weights import ShareWeights, plan_runs
from cpcompile.passes.trim_vocabulary import MARK, Trimming, TrimVocabulary, compose_kept
from tests.unit.passes.decoders import CONTEXTS, dynamic_graph, random_decoder, random_selection
from tests.unit.passes.graph_text import Array, Weights, canonical, parse, run, tensor

KEPT = (1, 3, 4)
IDS = np.array([[0, 1, 2, 1, 0], [2, 2, 1, 0, 1], [1, 0, 0, 2, 2]])
SEQUENCES = "(int64[N,S] input_ids) => (float[N,S,6] logits)"
TOKENS = "(int64[N] input_ids) => (float[N,6] logits)"


def trim(before: str, weights: Weights, *, kept: Sequence[int] = KEPT, opset: int = 23) -> tuple[ir.Model, Trimming]:
    """The trimmed model, checked: valid, its logits, what it says that it kept, and that a second run does nothing."""
    original = parse(before, weights, opset=opset)
    model = original.clone()
    trimming = TrimVocabulary(tuple(kept))(model)
    assert isinstance(trimming, Trimming) and trimming.modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_trimmed_values(original, model, kept, IDS if "N,S" in before else IDS[0], 1e-6)
    assert_kept(original, model, trimming.kept)
    assert trimming.kept.keys() >= set(weights)
    again = TrimVocabulary(tuple(kept))(model)
    assert isinstance(again, Trimming) and not again.modified
    assert again.kept == {name: (None,) * len(v.shape or ()) for name, v in model.graph.initializers.items()}
    return model, trimming


def assert_trimmed_values(before: ir.Model, after: ir.Model, kept: Sequence[int], ids: Array, tolerance: float) -> None:
    """New ids give the logits that the old ids gave, at the kept ids; relative to the largest."""
    expected = run(before, {"input_ids": np.asarray(kept)[ids]})["logits"][..., list(kept)]
    results = run(after, {"input_ids": ids})
    assert list(results) == ["logits"]
    got = results["logits"]
    assert got.shape == expected.shape == (*ids.shape, len(kept))
    assert np.isfinite(expected).all()
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def assert_kept(before: ir.Model, after: ir.Model, kept: KeptChannels, **permuted: tuple[int, ...]) -> None:
    """Every initializer is the part of the original that `kept` says it is."""
    for name, axes in kept.items():
        whole = tensor(before, name)
        whole = whole.transpose(permuted.get(name, tuple(range(whole.ndim))))
        for axis, indices in enumerate(axes):
            whole = whole if indices is None else whole.take(indices, axis=axis)
        assert np.array_equal(tensor(after, name), whole), name


def plain(kept: KeptChannels) -> dict[str, list[list[int] | None]]:
    return {name: [None if axis is None else axis.tolist() for axis in axes] for name, axes in kept.items()}


LOOKUP, HEAD = "e = Gather(w, input_ids)", "logits = MatMul(e, v)"
ROWS, COLUMNS = [list(KEPT), None], [None, list(KEPT)]
CASES = {
    "tied by Transpose": (
        "e = Gather(w, input_ids) t = Transpose<perm = [1, 0]>(w) logits = MatMul(e, t)",
        {"w": (6, 4)},
        {"w": ROWS},
    ),
    "tied by Gemm with a bias": (
        "e = Gather(w, input_ids) logits = Gemm<transB = 1>(e, w, b)",
        {"w": (6, 4), "b": (6,)},
        {"w": ROWS, "b": [list(KEPT)]},
    ),
    "tied with a bias": (
        "e = Gather(w, input_ids) t = Transpose<perm = [1, 0]>(w) y = MatMul(e, t) logits = Add(y, b)",
        {"w": (6, 4), "b": (6,)},
        {"w": ROWS, "b": [list(KEPT)]},
    ),
    "tied and stored as the head needs it": (
        "t = Transpose<perm = [1, 0]>(w) e = Gather(t, input_ids) logits = MatMul(e, w)",
        {"w": (4, 6)},
        {"w": COLUMNS},
    ),
    "untied": (
        "e = Gather(w, input_ids) h = Relu(e) logits = MatMul(h, v)",
        {"w": (6, 4), "v": (4, 6)},
        {"w": ROWS, "v": COLUMNS},
    ),
    "untied with a bias, scaled": (
        "e = Gather(w, input_ids) y = MatMul(e, v) z = Add(y, b) c = Tanh(z) logits = Mul(c, s)",
        {"w": (6, 4), "v": (4, 6), "b": (6,), "s": np.array(30.0)},
        {"w": ROWS, "v": COLUMNS, "b": [list(KEPT)], "s": []},
    ),
    "two tables, ids moved and cast": (
        "i = Cast<to = 6>(input_ids) u = Unsqueeze(i, one) q = Squeeze(u, one) a = Gather(w, q)"
        " k = Flatten<axis = 1>(input_ids) c = Gather(v, k) e = Add(a, c)"
        " t = Transpose<perm = [1, 0]>(w) logits = MatMul(e, t)",
        {"w": (6, 4), "v": (6, 4), "one": np.array([1])},
        {"w": ROWS, "v": ROWS, "one": [None]},
    ),
    "one table, looked up twice": (
        "a = Gather(w, input_ids) c = Gather<axis = 0>(w, input_ids) n = Mul(a, s) e = Add(n, c) logits = MatMul(e, v)",
        {"w": (6, 4), "v": (4, 6), "s": (4,)},
        {"w": ROWS, "v": COLUMNS, "s": [None]},
    ),
    "positions by the shape of the ids": (
        "l = Shape<start = 1, end = 2>(input_ids) s = Squeeze(l) i = Range(zero, s, one) p = Gather(pos, i)"
        " e = Gather(w, input_ids) x = Add(e, p) logits = MatMul(x, v)",
        {"w": (6, 4), "v": (4, 6), "pos": (6, 4), "zero": np.array(0), "one": np.array(1)},
        {"w": ROWS, "v": COLUMNS, "pos": [None, None], "zero": [], "one": []},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("opset", [20, 23])
def test_before_and_expected(case: str, opset: int) -> None:
    """The same nodes, and nothing in place of what was cut: neither a Gather nor a second table."""
    body, weights, kept = CASES[case]
    header = TOKENS if "Gemm" in body else SEQUENCES
    model, trimming = trim(f"{header} {{ {body} }}", weights, opset=opset)
    small = {name: tensor(model, name) for name in weights}
    assert model.graph.initializers.keys() == small.keys()
    assert canonical(model) == canonical(parse(f"{header.replace('6]', '3]')} {{ {body} }}", small, opset=opset))
    assert plain(trimming.kept) == kept


def test_keeping_everything_changes_nothing() -> None:
    model = parse(f"{SEQUENCES} {{ {LOOKUP} {HEAD} }}", {"w": (6, 4), "v": (4, 6)})
    before = canonical(model)
    trimming = TrimVocabulary(tuple(range(6)))(model)
    assert not trimming.modified and canonical(model) == before and MARK not in model.metadata_props


def test_one_token_is_enough() -> None:
    original = parse(f"{SEQUENCES} {{ {LOOKUP} {HEAD} }}", {"w": (6, 4), "v": (4, 6)})
    model = original.clone()
    assert TrimVocabulary((2,))(model).modified
    assert tensor(model, "w").shape == (1, 4) and tensor(model, "v").shape == (4, 1)
    assert_trimmed_values(original, model, (2,), np.zeros_like(IDS), 1e-6)


def test_other_names_and_other_outputs_stay() -> None:
    text = (
        "(int64[N,S] tokens, float[N,4] x) => (float[N,4] y, float[N,S,6] scores) { y = Neg(x) e = Gather(w, tokens) "
    )
    original = parse(text + "scores = MatMul(e, v) }", {"w": (6, 4), "v": (4, 6)})
    model = original.clone()
    assert TrimVocabulary(KEPT, ids="tokens", logits="scores")(model).modified
    assert [(v.name, list(v.shape or ())[-1]) for v in model.graph.outputs] == [("y", 4), ("scores", 3)]
    x = np.ones((3, 4), dtype=np.float32)
    expected = run(original, {"tokens": np.array(KEPT)[IDS], "x": x})
    got = run(model, {"tokens": IDS, "x": x})
    assert np.array_equal(got["y"], expected["y"])
    assert np.abs(got["scores"] - expected["scores"][..., list(KEPT)]).max() <= 1e-6


REFUSED = [
    (f"{LOOKUP} {HEAD}", (1, 6), UsageError, "token 6 is to be kept, the model has the tokens 0 to 5"),
    (f"{LOOKUP} y = MatMul(e, v) logits = Softmax(y)", KEPT, CpcompileError, "3 of the 6 entries of .* Softmax"),
    ("e = Cast<to = 1>(input_ids) f = Unsqueeze(e, two) logits = MatMul(f, r)", KEPT, CpcompileError, "Cast .* reads"),
    (f"{LOOKUP} p = Equal(input_ids, two) f = Where(p, e, e) logits = MatMul(f, v)", KEPT, CpcompileError, "Equal"),
    ("s = Shape(input_ids) e = Expand(r, s) logits = MatMul(e, r)", KEPT, CpcompileError, "no table is looked up by"),
    (f"{LOOKUP} logits = MatMul(e, q)", KEPT, CpcompileError, "not the vocabulary: it is 4 long, the table 'w' is of"),
    (
        f"{LOOKUP} l = Shape(v) y = MatMul(e, v) c = Cast<to = 1>(l) m = ReduceMax(c) logits = Add(y, m)",
        KEPT,
        CpcompileError,
        "3 of the 6 entries of .* because of Shape .*: its length is read",
    ),
    ("n = Neg(input_ids) e = Gather(w, n) logits = MatMul(e, v)", KEPT, CpcompileError, "Neg .* reads the token ids"),
    (
        "e = Gather<axis = 1>(r, input_ids) f = MatMul(e, e) logits = MatMul(f, r)",
        KEPT,
        CpcompileError,
        "3 of the 6 entries of .* cannot be trimmed because of MatMul",
    ),
]


@pytest.mark.parametrize(("body", "kept", "error", "message"), REFUSED)
def test_what_cannot_be_trimmed_says_why(
    body: str, kept: tuple[int, ...], error: type[CpcompileError], message: str
) -> None:
    weights: Weights = {"w": (6, 4), "v": (4, 6), "q": (4, 4), "r": (1, 6), "two": np.array([2])}
    model = parse(f"(int64[N,S] input_ids) => (float[N,S,K] logits) {{ {body} }}", weights)
    with pytest.raises(CpcompileError, match=message) as raised:
        TrimVocabulary(kept)(model)
    assert type(raised.value) is error


@pytest.mark.parametrize("kept", [(), (3, 1), (1, 1, 2), (-1, 2)])
def test_kept_ids_ascend(kept: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="kept ids have to be ascending from 0 on, and at least one"):
        TrimVocabulary(kept)
    assert "kept" not in repr(TrimVocabulary(KEPT))


def test_wrong_names_opsets_and_second_vocabularies_are_refused() -> None:
    text = f"{SEQUENCES} {{ {LOOKUP} {HEAD} }}"
    weights: Weights = {"w": (6, 4), "v": (4, 6)}
    with pytest.raises(UsageError, match="no input 'tokens'; it has input_ids"):
        TrimVocabulary(KEPT, ids="tokens")(parse(text, weights))
    with pytest.raises(UsageError, match="no output 'scores'; it has logits"):
        TrimVocabulary(KEPT, logits="scores")(parse(text, weights))
    with pytest.raises(CpcompileError, match="trim_vocabulary needs opset 13 or later, .* is in opset 12; convert"):
        TrimVocabulary(KEPT)(parse(text, weights, opset=12))
    model, _ = trim(text, weights)
    with pytest.raises(UsageError, match="trimmed to another vocabulary already"):
        TrimVocabulary((0, 1))(model)
    assert ir.from_proto(ir.to_proto(model)).metadata_props[MARK] == model.metadata_props[MARK]


def test_a_second_output_that_needs_all_logits_is_named() -> None:
    text = f"(int64[N,S] input_ids) => (float[N,S,6] logits, int64[N,S,1] best) {{ {LOOKUP} {HEAD} best = ArgMax"
    model = parse(text + "<axis = -1>(logits) }", {"w": (6, 4), "v": (4, 6)})
    with pytest.raises(CpcompileError, match="3 of the 6 entries of .* cannot be trimmed because of ArgMax"):
        TrimVocabulary(KEPT)(model)


def test_kept_channels_are_composed() -> None:
    a, b = np.array([1, 4, 6, 8]), np.array([0, 3])
    first: KeptChannels = {"w": (a, None, a, None), "gone": (a,), "v": (None,)}
    then: KeptChannels = {"w": (b, b, None, None), "v": (b,), "new": (b,)}
    assert plain(compose_kept(first, then)) == {"w": [[1, 8], [0, 3], [1, 4, 6, 8], None], "v": [[0, 3]]}


def some_tokens(size: int, seed: int) -> tuple[int, ...]:
    chosen = np.random.default_rng(seed).choice(512, size, replace=False)
    return tuple(sorted(int(token) for token in chosen))


@pytest.mark.parametrize(("opset", "kv_heads"), [pytest.param(20, 4, marks=pytest.mark.slow), (23, 2)])
def test_a_frozen_decoder(opset: int, kv_heads: int) -> None:
    """Tied: one initializer, as many logits as tokens are kept, equal to those of the untrimmed engine."""
    model = random_decoder(kv_heads, kv_heads)
    model.select(random_selection(model, kv_heads))
    dynamic = dynamic_graph(model, opset)
    parameters = {name for name, _ in model.named_parameters() if not name.endswith("_gate.table")}
    for index in range(len(CONTEXTS)):
        frozen, kept = freeze(dynamic, index), some_tokens(100, index)
        engine = frozen.model.clone()
        trimming = TrimVocabulary(kept, clean_up=CleanUp(frozenset(dynamic.graph.initializers)))(engine)
        assert isinstance(trimming, Trimming)
        onnx.checker.check_model(ir.to_proto(engine), full_check=True)
        ids = np.random.default_rng(index).integers(0, 100, (2, 7))
        assert_trimmed_values(frozen.model, engine, kept, ids, 1e-5)
        whole_ids = np.asarray(kept)[ids]
        with torch.no_grad():
            eager = model(torch.from_numpy(whole_ids), torch.tensor(index)).numpy()[..., list(kept)]
        assert np.abs(run(engine, {"input_ids": ids})["logits"] - eager).max() <= 1e-5 * np.abs(eager).max()
        # Nothing but the vocabulary got smaller, and no node came or went.
        assert [n.op_type for n in engine.graph] == [n.op_type for n in frozen.model.graph]
        sizes = {
            m: {n: v.const_value.size for n, v in g.graph.initializers.items() if v.const_value}
            for m, g in (("before", frozen.model), ("after", engine))
        }
        assert sizes["after"] == sizes["before"] | {"embedding.weight": 100 * 64}
        composed = compose_kept(frozen.kept, trimming.kept)
        assert plain(composed)["embedding.weight"] == [None, list(kept)]  # it is stored as its head reads it
        assert_kept(
            dynamic, engine, {n: axes for n, axes in composed.items() if n in parameters}, **frozen.permutations
        )
        assert not EliminateDeadChannels()(engine).modified


@pytest.mark.slow
def test_an_untied_decoder() -> None:
    """The head is stored transposed once frozen; what is kept of it is in that layout."""
    torch.manual_seed(0)
    model = Decoder(replace(preset("nano"), tied=False), contexts=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3)
    dynamic, kept = capture(model), some_tokens(77, 1)
    frozen = freeze(dynamic, 0)
    engine = frozen.model.clone()
    trimming = TrimVocabulary(kept)(engine)
    assert isinstance(trimming, Trimming)
    assert_trimmed_values(frozen.model, engine, kept, np.random.default_rng(0).integers(0, 77, (2, 7)), 1e-5)
    composed = compose_kept(frozen.kept, trimming.kept)
    assert tensor(engine, "embedding.weight").shape == (77, 64) and tensor(engine, "head.weight").shape == (64, 77)
    assert plain(composed)["embedding.weight"] == [list(kept), None]
    assert plain(composed)["head.weight"] == [None, list(kept)]
    assert_kept(dynamic, engine, {n: composed[n] for n in ("embedding.weight", "head.weight")}, **frozen.permutations)


def test_the_graph_of_all_contexts() -> None:
    """Not frozen: a graph of that kind needs nothing of what freezing does."""
    dynamic, kept = dynamic_graph(random_decoder(2, 0), 23), some_tokens(50, 2)
    smaller = dynamic.clone()
    assert TrimVocabulary(kept)(smaller).modified
    ids, context = np.random.default_rng(0).integers(0, 50, (2, 7)), np.array(1)
    before = run(dynamic, {"input_ids": np.asarray(kept)[ids], "context": context})["logits"][..., list(kept)]
    after = run(smaller, {"input_ids": ids, "context": context})["logits"]
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert tensor(smaller, "embedding.weight").shape == (50, 64)


def test_contexts_of_different_vocabularies_share_their_rows() -> None:
    """What `kept` says is enough to store every row once; the runs give each context its logits."""
    model = random_decoder(2, 0)
    dynamic = dynamic_graph(model, 23)
    own = {"a": tuple(range(0, 200)), "b": tuple(range(150, 300)), "c": (*range(0, 100), *range(280, 400))}
    engines, kept = {}, {}
    for index, (context, tokens) in enumerate(own.items()):
        frozen = freeze(dynamic, index)
        trimming = TrimVocabulary(tokens)(frozen.model)
        assert isinstance(trimming, Trimming)
        engines[context] = frozen.model
        kept[context] = {"embedding.weight": compose_kept(frozen.kept, trimming.kept)["embedding.weight"]}
    plan = plan_runs(kept, {"embedding.weight": (64, 512)})
    whole = tensor(dynamic, "embedding.weight").T
    assert sum(piece.cut(whole).shape[1] for piece in plan["embedding.weight"]) == 400
    for context, engine in engines.items():
        before = run(engine, {"input_ids": IDS})["logits"]
        assert ShareWeights(context, plan)(engine).modified
        assert np.abs(run(engine, {"input_ids": IDS})["logits"] - before).max() <= 1e-5 * np.abs(before).max()
