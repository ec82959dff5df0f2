"""TensorRT-RTX engines: their size relative to the parameters that they keep, and the cost of building them.

    python benchmarks/tensorrt_build.py smollm2.pt

Every context, and the dense baseline as one plain export, is built in a process of its own, whose peak includes the
libraries. A plan also contains kernels, so small models look worse.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir
from common import save
from rich.console import Console
from rich.table import Table

from cpcompile.core.rounding import SCHEMES
from cpcompile.frontend.source import open_source
from cpcompile.machine.subprocesses import in_fresh_process
from cpcompile.passes.dequantize_weights import DequantizeWeights
from cpcompile.passes.freeze import freeze, prepare
from cpcompile.passes.share_weights import Whole
from cpcompile.pipeline.write_engines import legal_for_plans
from cpcompile.targets.requests import RTX_PRECISIONS

BUILD = """
import json, sys, time
from pathlib import Path
import onnx_ir as ir
from cpcompile.exporters.tensorrt_exporter import PLAN_FILE, export_tensorrt, require_target
from cpcompile.machine.memory import peak_resident_bytes
from cpcompile.targets.requests import parse_target
model, target, precision, sequence = Path(sys.argv[1]), parse_target(sys.argv[2]), sys.argv[3], int(sys.argv[4])
require_target(target)
empty = peak_resident_bytes()
started = time.perf_counter()
folder = model.parent
export_tensorrt(ir.load(model), folder, target=target, precision=precision, ranges={}, sequence=sequence)
seconds, plan = time.perf_counter() - started, (folder / PLAN_FILE).stat().st_size
print(json.dumps({"seconds": seconds, "plan": plan, "peak": peak_resident_bytes(), "empty": empty}))
"""


@click.command()
@click.argument("model", type=click.Path(path_type=Path), default="demo/model.pt")
@click.option("--target", default="tensorrt-rtx")
@click.option("--precision", type=click.Choice(RTX_PRECISIONS), default="fp16")
def main(model: Path, target: str, precision: str) -> None:
    source = open_source(model)
    prepared = prepare(source.capture(opset=23))
    dense = source.capture_dense(opset=23)
    total = sum(source.parameter_sizes().values())
    sequence = source.sequence or 128
    results = {}
    if dense is not None:
        results["dense"] = _build(prepare(dense).model, target, precision, sequence) | {"parameters": total}
        del dense
    for index, context in enumerate(source.contexts):
        kept = sum(source.kept_sizes(context, None).values())
        built = _build(freeze(prepared, index).model, target, precision, sequence)
        results[context] = built | {"parameters": kept}
    table = Table(title=f"{target} {precision}, {total / 1e6:.2f} M parameters")
    for column in (
        "",
        "kept",
        "plan MB",
        "plan / dense plan",
        "over kept / total",
        "seconds",
        "peak MB",
        "over weights",
    ):
        table.add_column(column)
    for name, row in results.items():
        part = row["parameters"] / total
        row["of_dense"] = row["plan"] / results["dense"]["plan"] if "dense" in results else None
        row["over_part"] = row["of_dense"] / part if row["of_dense"] is not None else None
        row["over_weights"] = row["peak"] / row["weights"]
        shares = (f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("of_dense", "over_part"))
        figures = (f"{row['seconds']:.1f}", f"{row['peak'] / 1e6:.0f}", f"{row['over_weights']:.1f}")
        table.add_row(name, f"{part:.0%}", f"{row['plan'] / 1e6:.1f}", *shares, *figures)
    Console().print(table)
    name = "tensorrt_build" + (f"_{precision}" if precision != "fp16" else "")
    save(name, {"target": target, "precision": precision, "parameters": total, "engines": results})


def _build(model: ir.Model, target: str, precision: str, sequence: int) -> dict[str, Any]:
    """The figures of one build; `weights` are the bytes of the tensors in its graph."""
    if precision in SCHEMES:
        own = {name: value.const_value for name, value in model.graph.initializers.items()}
        whole = {name: Whole(tuple(t.shape.numpy()), t.numpy) for name, t in own.items() if t and len(t.shape) == 2}
        DequantizeWeights(precision, dict.fromkeys(whole, (None, None)), whole)(model)
    model = legal_for_plans(model, precision)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.onnx"
        ir.save(model, path, external_data="in.bin")
        del model
        arguments = (str(path), target, precision, str(sequence))
        found: dict[str, Any] = in_fresh_process("-W", "ignore", "-c", BUILD, *arguments)
    return found | {"weights": weights}


if __name__ == "__main__":
    main()
