"""The logits of the last token alone: of texts that are filled up on either side, and of steps with a cache."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from cpcompile.core.cache import INPUT, KEEP, MASK, OUTPUT, POSITIONS
from cpcompile.core.errors import CpcompileError
from cpcompile.passes.freeze import freeze
from cpcompile.passes.keep_last_logits import KeepLastLogits
from tests.unit.passes.decoders import FORMS, dynamic_graph, random_decoder, random_selection
from tests.unit.passes.graph_text import parse
from tests.unit.passes.test_caches import assert_close, opened, step


@pytest.mark.parametrize(("opset", "kv_heads"), FORMS)
def test_the_last_token_of_each_text_keeps_its_logits(opset: int, kv_heads: int) -> None:
    model = random_decoder(kv_heads, 2)
    model.select(random_selection(model, 2))
    frozen = freeze(dynamic_graph(model, opset, cached=True), 1).model
    whole = opened(frozen)
    assert KeepLastLogits()(frozen).modified and not KeepLastLogits()(frozen).modified
    onnx.checker.check_model(ir.to_proto(frozen), full_check=True)
    last = opened(frozen)
    assert KEEP not in {each.name for each in last.get_inputs()}
    assert next(each.shape for each in last.get_outputs() if each.name == OUTPUT) == ["batch", 1, 512]
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 512, length) for length in (7, 3)]
    expected = [step(whole, {INPUT: text[None]})[0][:, -1:] for text in texts]
    for side in ("left", "right"):
        full = [np.pad(text, (0, 7 - len(text)) if side == "right" else (7 - len(text), 0)) for text in texts]
        real = [np.pad(np.ones_like(t), (0, 7 - len(t)) if side == "right" else (7 - len(t), 0)) for t in texts]
        mask = np.stack(real)
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        logits, cache = step(last, {INPUT: np.stack(full), MASK: mask, POSITIONS: positions})
        for row, each in enumerate(expected):
            assert_close(logits[row : row + 1], each)
        feeds = {INPUT: np.array([[5], [6]]), MASK: np.c_[mask, [1, 1]], POSITIONS: np.array([[7], [3]])}
        after, _ = step(last, {**feeds, **cache})
        for row, (text, token) in enumerate(zip(texts, (5, 6), strict=True)):
            assert_close(after[row : row + 1], step(whole, {INPUT: np.r_[text, token][None]})[0][:, -1:])


def test_other_graphs_stay_or_are_refused() -> None:
    plain = parse("(int64[N,S] input_ids) => (float[N,S,4] logits) { logits = Gather(w, input_ids) }", {"w": (6, 4)})
    assert not KeepLastLogits()(plain).modified
    text = """(int64[N,S] input_ids, int64 logits_to_keep) => (float[N,S,4] logits) {
        k = Cast<to = 1>(logits_to_keep) h = Gather(w, input_ids) logits = Add(h, k) }"""
    with pytest.raises(CpcompileError, match="0 nodes slice by the input 'logits_to_keep', and exactly one should"):
        KeepLastLogits()(parse(text, {"w": (6, 4)}))
