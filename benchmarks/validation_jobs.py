"""How long it takes to compare the engines of all contexts with the eager model, by the number of processes.

    python benchmarks/validation_jobs.py demo/model.pt

The bundle is built without validation; then `cpcompile validate`, without timings and measurements of memory, runs
with each number of `--jobs` in turn, several times.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from common import save, spread
from rich.console import Console
from rich.table import Table

from cpcompile.bundle.reader import open_bundle
from cpcompile.cli.options import VERDICT_EXIT_CODES
from cpcompile.machine.environment import available_cores

COMPARISONS_ALONE = ("--no-speed", "--no-memory", "--no-layers")


def seconds_of(*arguments: object) -> float:
    """How long a command takes, whatever its verdict is."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "cpcompile", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode not in VERDICT_EXIT_CODES.values():
        raise click.ClickException(done.stderr)
    return time.perf_counter() - started


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default="demo/model.pt")
@click.option("--jobs", default=f"1,{available_cores()}", help="Numbers of processes.")
@click.option("--runs", default=3)
@click.option("--name", default="validation_jobs", help="Name of the file of results.")
def main(model: Path, jobs: str, runs: int, name: str) -> None:
    counts = [int(each) for each in jobs.split(",")]
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "model.cpc"
        seconds_of("build", model, "-o", bundle, "--no-validate")
        contexts = len(open_bundle(bundle).contexts)
        for _ in range(runs):
            for count in counts:
                command = ("validate", bundle, "--model", model, "--jobs", count, *COMPARISONS_ALONE)
                seconds[count].append(seconds_of(*command))
                print(f"{count} jobs: {seconds[count][-1]:.1f} s", flush=True)
    rows = {count: spread(each) for count, each in seconds.items()}
    table = Table(title=f"{contexts} contexts, {available_cores()} cores")
    for column in ("jobs", "seconds (median)", "times as fast"):
        table.add_column(column, justify="right")
    for count, row in rows.items():
        ratio = rows[counts[0]]["median"] / row["median"]
        table.add_row(str(count), f"{row['median']:.1f}", f"{ratio:.2f}")
    Console().print(table)
    save(name, {"contexts": contexts, "jobs": {str(count): row for count, row in rows.items()}})


if __name__ == "__main__":
    main()
