"""Tied weights row by row: the same logits, the numbers stored once, and other weights left alone."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from cpcompile.passes.derived_parameters import Derivation
from cpcompile.passes.share_weights import Whole
from cpcompile.passes.tied_head import TiedHead
from tests.unit.passes.graph_text import check, parse

TIED = """(int64[B, S] ids) => (float[B, S, 12] logits) {
    columns = Gather<axis = 1>(E, ids)
    x = Transpose<perm = [1, 2, 0]>(columns)
    logits = MatMul(x, E)
}"""
OWN_TABLE = """(int64[B, S] ids) => (float[B, S, 12] logits) {
    x = Gather(T, ids)
    logits = MatMul(x, E)
}"""


def run(model: ir.Model, ids: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": ids})[0]


def test_a_tied_weight_lies_in_rows_and_gives_the_same_logits() -> None:
    table = np.random.default_rng(0).standard_normal((8, 20)).astype(np.float32)
    kept = np.array([0, 2, 3, 5, 6, 7, 10, 11, 13, 14, 17, 19])
    ids = np.random.default_rng(1).integers(0, 12, (2, 5))
    model = parse(TIED, {"E": table[:, kept]})
    expected = run(model, ids)
    result = TiedHead({"E": (None, kept)}, {"E": Whole(table.shape, partial(np.asarray, table))})(model)
    assert isinstance(result, Derivation) and result.modified
    check(model)
    np.testing.assert_allclose(run(model, ids), expected, rtol=1e-6, atol=1e-6)
    assert Counter(node.op_type for node in model.graph) == {"Gather": 1, "FusedMatMul": 1}
    (name,) = model.graph.initializers
    derived = result.parameters[name]
    np.testing.assert_array_equal(derived.whole.read(), table.T)
    assert derived.kept[0] is kept and derived.kept[1] is None


def test_a_head_with_a_weight_of_its_own_stays() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "T": rng.standard_normal((20, 8)).astype(np.float32),
        "E": rng.standard_normal((8, 12)).astype(np.float32),
    }
    model = parse(OWN_TABLE, arrays)
    whole = {name: Whole(array.shape, partial(np.asarray, array)) for name, array in arrays.items()}
    result = TiedHead(dict.fromkeys(arrays, (None, None)), whole)(model)
    assert not result.modified and set(model.graph.initializers) == {"T", "E"}
