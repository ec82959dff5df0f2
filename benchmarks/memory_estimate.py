"""Compare `cpcompile estimate` with the measured peak of a build, for the presets and any checkpoints.

    python benchmarks/memory_estimate.py                    nano, tiny and small, trained for two steps
    python benchmarks/memory_estimate.py smollm2.pt         these as well; large models take as long as their builds

Each build runs in a fresh process. Two peaks are compared: that of the build's stages in the report, and that of the
whole process with its validation (VmHWM of proc_pid_status(5)). Speed is not measured, nor is memory in separate
processes, which are not part of the peak; an engine's own peaks are compared with one measurement each. How well a
model was trained makes no difference.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from common import save
from rich.console import Console
from rich.table import Table

from cpcompile.core.config import PRESETS
from cpcompile.machine.subprocesses import in_fresh_process
from cpcompile.text.installed_text import write_installed_corpus
from cpcompile.validation.memory import measure_engine

SHAPE = (1, 128)
RUN = """
import json, sys
from cpcompile.cli import main
from cpcompile.machine.memory import peak_resident_bytes
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code in (0, 1, 3), stop.code
print()
print(json.dumps(peak_resident_bytes()))
"""


def measure(model: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Predicted and measured bytes of everything that was predicted."""
    estimated = in_fresh_process("-c", RUN_JSON, "estimate", str(model), "--no-memory", "--json")
    bundle = folder / f"{model.stem}.cpc"
    peak = in_fresh_process("-c", RUN, "build", str(model), "-o", str(bundle), "--no-speed", "--no-memory")
    bundle = bundle if bundle.exists() else bundle.with_name(f"{bundle.name}.failed")
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    context = report["contexts"][0]["name"]
    engine = measure_engine(
        bundle, context, "cpu-fp32", {"input_ids": np.zeros(SHAPE, dtype=np.int64)}, threads=threads
    )
    if isinstance(engine, str):
        raise click.ClickException(engine)
    process = estimated["engines"][context]
    pairs = {
        "build": (estimated["build_peak_rss_bytes"], report["build"]["peak_rss_bytes"]),
        "build and validation": (estimated["process_peak_rss_bytes"], peak),
        "engine, loading": (process["load_peak_rss_bytes"], engine.load_peak_rss_bytes),
        "engine, running": (process["run_peak_rss_bytes"], engine.run_peak_rss_bytes),
        "bundle": (estimated["bundle_bytes"], report["bundle"]["bytes"]),
    }
    return {name: {"predicted": predicted, "measured": measured} for name, (predicted, measured) in pairs.items()}


RUN_JSON = """
import contextlib, io, json, sys
from cpcompile.cli import main
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    main(sys.argv[1:], standalone_mode=False)
print(json.dumps(json.loads(printed.getvalue())))
"""


def train(preset: str, folder: Path, corpus: Path) -> Path:
    """Train a checkpoint of `preset` with its dense baseline."""
    model = folder / f"{preset}.pt"
    arguments = ["--preset", preset, "--steps", "2", "--batch", "1", "-o", str(model), "--cache", str(folder / "cache")]
    in_fresh_process("-c", RUN, "train", "--data", str(corpus), *arguments)
    return model


@click.command()
@click.argument("models", type=click.Path(path_type=Path), nargs=-1)
@click.option("--presets", default=",".join(PRESETS), help="Comma-separated presets to train and build.")
@click.option("--threads", default=1)
def main(models: tuple[Path, ...], presets: str, threads: int) -> None:
    results: dict[str, Any] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if presets:
            corpus = write_installed_corpus(folder / "corpus", bytes_per_context=400_000)
            for preset in presets.split(","):
                results[preset] = measure(train(preset, folder, corpus), folder, threads)
        for model in models:
            results[model.stem] = measure(model, folder, threads)
    table = Table(title="predicted against measured")
    for column in ("model", "what", "predicted MB", "measured MB", "off by"):
        table.add_column(column, justify="left" if column in ("model", "what") else "right")
    for name, whats in results.items():
        for what, sides in whats.items():
            off = sides["predicted"] / sides["measured"] - 1
            table.add_row(name, what, *(f"{sides[s] / 1e6:,.1f}" for s in ("predicted", "measured")), f"{off:+.1%}")
    Console().print(table)
    worst = max(
        abs(p["build and validation"]["predicted"] / p["build and validation"]["measured"] - 1)
        for p in results.values()
    )
    print(f"peak of build and validation: off by at most {worst:.1%}")
    save("memory_estimate", {"models": results})


if __name__ == "__main__":
    main()
