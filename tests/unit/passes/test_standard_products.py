"""Products by rows in the operators of the standard: the same values, and nothing else is touched."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.passes.standard_products import DOMAIN, StandardProducts
from tests.unit.passes.graph_text import check, parse, run

ROWS = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)


def product(**attributes: float) -> ir.Model:
    """logits = FusedMatMul(x, rows), with `attributes`; the output has the last name of the graph."""
    model = parse(
        "(float[N, S, 8] x) => (float[N, S, 12] logits) { y = Transpose(rows) logits = MatMul(x, y) }", {"rows": ROWS}
    )
    transpose, plain = model.graph
    fused = ir.node("FusedMatMul", [plain.inputs[0], transpose.inputs[0]], attributes, domain=DOMAIN, name="head")
    fused.metadata_props["module"] = "head"
    ir.convenience.replace_nodes_and_values(
        model.graph, transpose, [transpose, plain], [fused], plain.outputs, fused.outputs
    )
    model.graph.opset_imports[DOMAIN] = 1
    return model


def test_a_product_by_rows_becomes_two_operators_of_the_standard() -> None:
    model = product(transB=1)
    expected = run(model, {"x": X})["logits"]
    assert StandardProducts()(model).modified
    check(model)
    np.testing.assert_allclose(run(model, {"x": X})["logits"], expected, rtol=1e-6, atol=1e-6)
    assert Counter(node.op_type for node in model.graph) == {"Transpose": 1, "MatMul": 1}
    assert DOMAIN not in model.opset_imports and all(node.metadata_props["module"] == "head" for node in model.graph)
    assert not StandardProducts()(model).modified


@pytest.mark.parametrize("attributes", [{}, {"transB": 1, "alpha": 2.0}, {"transB": 1, "transA": 1}])
def test_others_stay(attributes: dict[str, float]) -> None:
    model = product(**attributes)
    assert not StandardProducts()(model).modified
    assert [node.op_type for node in model.graph] == ["FusedMatMul"] and DOMAIN in model.opset_imports
