"""Compare optimisers on a graph in which 75 % of the FFN channels and half of the heads are multiplied by zero.

    python benchmarks/dead_channels.py

The graph is a gated decoder of two layers with random weights, its context bound to a constant, in opset 20 (attention
spelled out) and 23 (attention as one operator). Every tool gets the same file. `expected` is the number of parameters
that the selection keeps; errors are relative to the file itself in ONNX Runtime without optimisations.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from common import save
from rich.console import Console
from rich.table import Table

from cpcompile.core.config import OPSETS, ModelConfig
from cpcompile.core.selection import UnitKind
from cpcompile.files.onnx_file import load_onnx, save_onnx, size_of
from cpcompile.frontend.capture import capture
from cpcompile.models.decoder import Decoder
from cpcompile.passes.bind_context import BindContext
from cpcompile.pipeline.optimize import optimize_file
from cpcompile.training.allocation import allocate_random

CONTEXTS = ("a", "b", "c")
BUDGETS = {UnitKind.FFN: 0.25, UnitKind.HEAD: 0.5}


def gated_decoder() -> tuple[Decoder, int]:
    """A gated decoder, and how many numbers its first context keeps: parameters and rotary frequencies."""
    torch.manual_seed(0)
    config = ModelConfig(vocabulary=4096, width=256, layers=2, heads=8, kv_heads=8, ffn=1024, align=32)
    model = Decoder(config, contexts=len(CONTEXTS))
    ones = {u.kind: np.ones((len(CONTEXTS), u.layers, u.count)) for u in model.units() if u.kind in BUDGETS}
    selection = allocate_random(CONTEXTS, ones, BUDGETS, seed=0, floor=0.5, one_for_all=False)
    model.select(selection)
    with torch.no_grad():  # trained norms: weights of one would be removed as well
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model, sum(model.kept_sizes(selection, CONTEXTS[0]).values()) + model.frequencies.numel()


def with_onnxsim(source: Path, out: Path) -> None:
    import onnxsim

    simplified, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(simplified, out)


def with_onnxslim(source: Path, out: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), out)


def with_onnxscript(source: Path, out: Path) -> None:
    import onnxscript.optimizer

    ir.save(onnxscript.optimizer.optimize(ir.load(source)), out)


def with_onnxruntime(source: Path, out: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def with_cpcompile(source: Path, out: Path) -> None:
    optimize_file(source, out, check="none")


TOOLS: Mapping[str, Callable[[Path, Path], None]] = {
    "onnxsim": with_onnxsim,
    "onnxslim": with_onnxslim,
    "onnxscript optimizer": with_onnxscript,
    "ONNX Runtime extended": with_onnxruntime,
    "cpcompile opt": with_cpcompile,
}


def logits_of(path: Path) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, 4096, (2, 64))
    return np.asarray(session.run(["logits"], {"input_ids": ids})[0])


def compare_tools(opset: int, model: Decoder, folder: Path) -> dict[str, Any]:
    """Nodes, parameters, seconds and error of every tool on one file."""
    source = folder / f"bound{opset}.onnx"
    bound = capture(model, opset=opset)
    BindContext(0)(bound)
    save_onnx(bound, source)
    wanted = logits_of(source)
    rows: dict[str, Any] = {
        "the file itself": {**vars(size_of(load_onnx(source))), "seconds": 0.0, "max_abs_error": 0.0}
    }
    for name, tool in TOOLS.items():
        out = folder / f"out{opset}-{name.replace(' ', '-')}.onnx"
        started = time.perf_counter()
        tool(source, out)
        seconds = time.perf_counter() - started
        error = float(np.abs(logits_of(out) - wanted).max())
        rows[name] = vars(size_of(load_onnx(out))) | {"seconds": seconds, "max_abs_error": error}
    return rows


@click.command()
def main() -> None:
    model, expected = gated_decoder()
    result: dict[str, Any] = {"expected": expected}
    with tempfile.TemporaryDirectory() as folder:
        for opset in OPSETS:
            rows = result[f"opset_{opset}"] = compare_tools(opset, model, Path(folder))
            table = Table(title=f"opset {opset}; {expected:,} numbers are expected")
            for column in ("", "nodes", "parameters", "seconds", "max abs error"):
                table.add_column(column, justify="left" if not column else "right")
            for name, row in rows.items():
                cells = (str(row["nodes"]), f"{row['parameters']:,}", f"{row['seconds']:.2f}")
                table.add_row(name, *cells, f"{row['max_abs_error']:.1e}")
            Console().print(table)
    save("dead_channels", result)


if __name__ == "__main__":
    main()
