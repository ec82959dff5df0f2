"""What a build costs by the size of the model and the number of contexts: seconds, peak memory, bytes of the bundle.

    python benchmarks/scaling.py --parameters 13M,40M,182M --contexts 1,4,16

Models have random weights and a vocabulary of 4,096. Each context keeps 25 % of the FFN blocks, of which half are kept
by all contexts, and half of the heads. Every build is a process of its own, `cpcompile build --no-validate`. The
exponents are the slopes of straight lines through the logarithms: 1 means that twice as much costs twice as much.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import save
from rich.console import Console
from rich.table import Table

from cpcompile.core.config import ModelConfig
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.machine.subprocesses import in_fresh_process

SHAPES = {
    "13M": ModelConfig(width=320, layers=7, heads=10, kv_heads=10, ffn=1280),
    "40M": ModelConfig(width=512, layers=9, heads=8, kv_heads=8, ffn=2048),
    "182M": ModelConfig(width=768, layers=19, heads=12, kv_heads=12, ffn=3072),
    "660M": ModelConfig(width=1280, layers=25, heads=20, kv_heads=20, ffn=5120),
    "1.1B": ModelConfig(width=2048, layers=16, heads=32, kv_heads=32, ffn=8192),
}
WRITE = "from scaling import write; import sys; write(*sys.argv[1:])"
"""In a process of its own, because its memory is not that of a build."""
BUILD = """
import json, resource, sys, time
from click.testing import CliRunner
started = time.perf_counter()
from cpcompile.cli import main
result = CliRunner().invoke(main, ["build", sys.argv[1], "-o", sys.argv[2], "--no-validate", "--json"])
assert result.exit_code == 0, result.output
stages = json.loads(result.stdout)["build"]["stages"]
seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "stages": {s["name"]: s["seconds"] for s in stages}}))
"""


def write(size: str, contexts: str, path: str) -> None:
    """Write a checkpoint with random weights and units."""
    import torch

    from cpcompile.frontend.checkpoint import Checkpoint, save_checkpoint
    from cpcompile.models.decoder import Decoder
    from cpcompile.text.tokenization import train_tokenizer

    config, names = SHAPES[size], tuple(f"context{index:02d}" for index in range(int(contexts)))
    torch.manual_seed(0)
    model, rng = Decoder(config, contexts=len(names)), np.random.default_rng(0)
    blocks = np.zeros((len(names), config.layers, config.ffn // config.align), dtype=np.bool_)
    heads = np.zeros((len(names), config.layers, config.kv_heads), dtype=np.bool_)
    core = blocks.shape[-1] // 8
    blocks[..., :core] = True
    for context, layer in product(range(len(names)), range(config.layers)):
        blocks[context, layer, core + rng.choice(blocks.shape[-1] - core, core, replace=False)] = True
        heads[context, layer, rng.choice(config.kv_heads, config.kv_heads // 2, replace=False)] = True
    selection = model.sort_units(Selection(names, {UnitKind.FFN: blocks, UnitKind.HEAD: heads}))
    model.select(selection)
    text = Path(train_tokenizer.__code__.co_filename).read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text], config.vocabulary).to_str()
    state = model.state_dict()
    save_checkpoint(
        Checkpoint(config=config, state=state, contexts=names, tokenizer=tokenizer, selection=selection), Path(path)
    )


def measure(size: str, contexts: int) -> dict[str, Any]:
    """Build one model in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        model, bundle = Path(folder) / "model.pt", Path(folder) / "model.cpc"
        subprocess.run(
            [sys.executable, "-c", WRITE, size, str(contexts), str(model)], check=True, cwd=Path(__file__).parent
        )
        dense = model.stat().st_size
        row: dict[str, Any] = in_fresh_process("-W", "ignore", "-c", BUILD, str(model), str(bundle))
        stored = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    return {"model": size, "contexts": contexts, "model_bytes": dense, "bundle_bytes": stored, **row}


def exponent(rows: list[dict[str, Any]], by: str, what: str) -> float | None:
    """The slope of `what` over `by`, both as logarithms; None for fewer than two values."""
    if len({row[by] for row in rows}) < 2:
        return None
    return float(np.polyfit(np.log([row[by] for row in rows]), np.log([row[what] for row in rows]), 1)[0])


def exponents_of(rows: list[dict[str, Any]], what: str) -> dict[str, dict[str, float | None]]:
    """By what `what` grows: with the model for each number of contexts, and with the contexts for each model."""
    counts, sizes = (dict.fromkeys(row[name] for row in rows) for name in ("contexts", "model"))
    return {
        "model_bytes": {str(c): exponent([r for r in rows if r["contexts"] == c], "model_bytes", what) for c in counts},
        "contexts": {size: exponent([r for r in rows if r["model"] == size], "contexts", what) for size in sizes},
    }


@click.command()
@click.option("--parameters", default="13M,40M,182M,660M,1.1B", help=f"Of {', '.join(SHAPES)}.")
@click.option("--contexts", default="1,4,16,64")
@click.option("--name", default="scaling", help="Name of the file of results.")
def main(parameters: str, contexts: str, name: str) -> None:
    sizes, counts = parameters.split(","), [int(each) for each in contexts.split(",")]
    rows: list[dict[str, Any]] = []
    table = Table(title="build without validation")
    for column in ("parameters", "contexts", "seconds", "peak RSS MB", "model MB", "bundle MB"):
        table.add_column(column, justify="right")
    for size, count in product(sizes, counts):
        row = measure(size, count)
        rows.append(row)
        print(json.dumps(row), flush=True)
        megabytes = [f"{row[name] / 1e6:,.0f}" for name in ("peak", "model_bytes", "bundle_bytes")]
        table.add_row(size, str(count), f"{row['seconds']:.1f}", *megabytes)
    Console().print(table)
    exponents = {what: exponents_of(rows, what) for what in ("seconds", "peak", "bundle_bytes")}
    print(json.dumps(exponents, indent=1))
    save(name, {"rows": rows, "exponents": exponents})


if __name__ == "__main__":
    main()
