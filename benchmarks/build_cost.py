"""Build time and peak memory: `cpcompile build` against one plain torch.onnx.export of the dense model.

    python benchmarks/build_cost.py demo/model.pt

Each run is in a fresh process, one after the other and repeated. Validation is not part of the stages of a build.
Memory is compared with the model's bytes on top of a process that has only imported what it needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from common import save, spread
from rich.console import Console
from rich.table import Table

from cpcompile.core.paths import dense_path
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.machine.subprocesses import in_fresh_process

EXPORT = """
import json, sys, time
from pathlib import Path
from cpcompile.frontend.capture import capture_dense
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.machine.memory import peak_resident_bytes
import onnx_ir as ir
import cpcompile.pipeline.build
empty = peak_resident_bytes()
model = load_checkpoint(Path(sys.argv[1])).model
started = time.perf_counter()
ir.save(capture_dense(model), sys.argv[2] + "/dense.onnx")
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak_resident_bytes(), "empty": empty}))
"""


def export(dense: Path) -> dict[str, float]:
    """Seconds and peak memory of one plain export of the dense model, and the memory of an empty process."""
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, float] = in_fresh_process("-W", "ignore", "-c", EXPORT, str(dense), folder)
    return result


@click.command()
@click.argument("model", type=click.Path(path_type=Path), default="demo/model.pt")
@click.option("--runs", default=3)
def main(model: Path, runs: int) -> None:
    dense = load_checkpoint(dense_path(model))
    size = sum(tensor.numel() * 4 for tensor in dense.state.values())
    exports, builds = [], []
    for _ in range(runs):
        exports.append(export(dense_path(model)))
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "model.cpc")
            command = [sys.executable, "-m", "cpcompile", "build", str(model), "-o", target]
            command += ["--no-speed", "--no-memory", "--json"]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            builds.append(json.loads(done.stdout))
    stages = {
        stage["name"]: spread(
            next(s["seconds"] for s in b["build"]["stages"] if s["name"] == stage["name"]) for b in builds
        )
        for stage in builds[0]["build"]["stages"]
    }
    contexts = len(builds[0]["contexts"])
    empty = exports[0]["empty"]
    exported, built = spread(e["seconds"] for e in exports), spread(b["build"]["seconds"] for b in builds)
    peaks = {"export": exports[0]["peak"], "build": builds[0]["build"]["peak_rss_bytes"], "empty": empty, "model": size}
    table = Table(title=f"{contexts} contexts, dense model {size / 1e6:.1f} MB")
    for column in ("", "seconds (median)", "peak RSS MB", "over the empty process, in model sizes"):
        table.add_column(column)
    for name, seconds in (("export", exported), ("build", built)):
        over = (peaks[name] - empty) / size
        table.add_row(name, f"{seconds['median']:.2f}", f"{peaks[name] / 1e6:.0f}", f"{over:.1f}")
    Console().print(table)
    print("stages:", ", ".join(f"{name} {row['median']:.2f} s" for name, row in stages.items()))
    save("build_cost", {"export": exported, "build": built, "stages": stages, "bytes": peaks, "contexts": contexts})


if __name__ == "__main__":
    main()
