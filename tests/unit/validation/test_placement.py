from __future__ import annotations

from pathlib import Path

import numpy as np

from cpcompile.bundle.reader import Bundle
from cpcompile.report.results import PlacedNode
from cpcompile.validation.placement import fallen_back, measure_placement


def test_every_node_that_ran_is_counted_once(bundle: Bundle, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    placement = measure_placement(bundle.variant("de", "cpu-fp32"), {"input_ids": np.zeros((1, 8), dtype=np.int64)})
    assert placement.nodes and not placement.not_measured
    assert placement.providers == {"CPUExecutionProvider": len(placement.nodes)}
    assert sum(placement.operators.values()) == sum(placement.precisions.values()) == len(placement.nodes)
    assert placement.operators["Attention"] == 2
    assert {node.precision for node in placement.nodes if node.operator in ("MatMul", "Gemm")} == {"float"}
    assert placement.verdict == "pass" and placement.reason is None
    assert list(tmp_path.iterdir()) == []


def _node(operator: str, provider: str, precision: str | None) -> PlacedNode:
    return PlacedNode(name=f"node_{operator}", operator=operator, provider=provider, precision=precision)


def test_nodes_that_compute_elsewhere_have_fallen_back() -> None:
    """The arithmetic of shapes is on the CPU for good reason."""
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    shapes = (_node("MatMul", cuda, "float16"), _node("Gather", cpu, "int64"), _node("Range", cpu, None))
    assert fallen_back(shapes, cuda) is None
    assert fallen_back((*shapes, _node("Einsum", cpu, "float")), cuda) == (
        "1 of 4 nodes fell back from CUDAExecutionProvider: Einsum node_Einsum ran on CPUExecutionProvider"
    )
    assert fallen_back((_node("Shape", "TensorrtExecutionProvider", "int64"),), cpu) is not None
