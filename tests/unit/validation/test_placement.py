from __future__ import annotations

from pathlib import Path

import numpy as np

from cpcompile.bundle import Bundle
from cpcompile.validation.placement import measure_placement


def test_every_node_that_ran_is_counted_once(bundle: Bundle, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    placement = measure_placement(bundle.variant("de", "cpu-fp32"), {"input_ids": np.zeros((1, 8), dtype=np.int64)})
    assert placement.nodes is not None and not placement.not_measured
    assert placement.providers == {"CPUExecutionProvider": len(placement.nodes)}
    assert sum(placement.operators.values()) == sum(placement.precisions.values()) == len(placement.nodes)
    assert placement.operators["Attention"] == 2
    assert {node.precision for node in placement.nodes if node.operator in ("MatMul", "Gemm")} == {"float"}
    assert list(tmp_path.iterdir()) == []
