"""Partition a pretrained model: without recovery, with least squares, with a short training; and the cost of its build.

    python benchmarks/pretrained.py SmolLM2-135M/ --work build-of-smollm2/

The contexts are Python, C++ and English text already on the machine; FFN budget 50 %, heads 75 %, trimmed vocabularies.
Results in the work folder are reused, so an interrupted run continues. The build is compared with one plain
`torch.onnx.export` of the dense model in a fresh process; limits: 1.3x its time plus 15 s per context, 3x the
model's bytes plus 1 GB.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from build_cost import export
from common import save
from rich.console import Console
from rich.table import Table

from cpcompile.core.paths import dense_path
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.report import mean_perplexity
from cpcompile.text.installed_text import write_installed_corpus
from cpcompile.training.trainer import work_path

SETTINGS = "[train]\nheld_out_tokens = 4096\nimportance_sequences = 32\nrecover_sequences = 32\n"


def train(folder: Path, work: Path, name: str, *flags: str) -> Path:
    """The checkpoint `name`, trained unless it exists."""
    out = work / f"{name}.pt"
    if not out.exists():
        (work / "settings.toml").write_text(SETTINGS)
        command = [sys.executable, "-m", "cpcompile", "train", "--data", str(work / "corpus")]
        command += ["--cache", str(work / "cache"), "--from-pretrained", str(folder), "--out", str(out)]
        command += ["--config", str(work / "settings.toml"), *flags]
        subprocess.run([*command, "--resume"] if work_path(out).exists() else command, check=True)
    return out


def build(model: Path) -> dict[str, Any]:
    """Build a bundle of `model` and return its report."""
    command = [sys.executable, "-m", "cpcompile", "build", str(model), "--vocabulary-coverage", "1"]
    command += ["--no-memory", "--rounds", "6", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--work", type=click.Path(path_type=Path), default="pretrained-benchmark", help="Folder for all files.")
@click.option("--steps", default=40, help="Steps of the short training, and of the dense baseline.")
def main(folder: Path, work: Path, steps: int) -> None:
    work.mkdir(exist_ok=True)
    if not (work / "corpus").exists():
        write_installed_corpus(work / "partial").rename(work / "corpus")
    models = {
        "no recovery": train(folder, work, "none", "--steps", "0"),
        "least squares": train(folder, work, "least-squares", "--steps", "0", "--recover", "least-squares"),
        f"least squares and {steps} steps": train(
            folder, work, "trained", "--steps", str(steps), "--recover", "least-squares"
        ),
    }
    perplexity: dict[str, dict[str, float]] = {}
    for name, path in models.items():
        found = load_checkpoint(path).training["perplexity"]
        if not perplexity:
            perplexity["dense parent"] = found["dense-baseline"]
        perplexity[name] = found["partition"]
    perplexity[f"dense model and {steps} steps"] = found["dense-baseline"]
    table = Table(title="held-out perplexity")
    for column in ("", "mean", *perplexity["dense parent"]):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in perplexity.items():
        table.add_row(name, *(f"{v:.2f}" for v in (mean_perplexity(list(values.values())), *values.values())))
    Console().print(table)

    dense = dense_path(models["least squares"])
    size = sum(tensor.numel() * 4 for tensor in load_checkpoint(dense).state.values())
    plain, report = export(dense), build(models["least squares"])
    built, contexts = report["build"], report["contexts"]
    limits = {
        "seconds": 1.3 * plain["seconds"] + 15 * len(contexts),
        "peak_rss_bytes": 3 * size + 1e9,
    }
    print(f"plain export {plain['seconds']:.0f} s, peak {plain['peak'] / 1e6:.0f} MB")
    print(f"build {built['seconds']:.0f} s of {limits['seconds']:.0f} allowed: ", end="")
    print(", ".join(f"{stage['name']} {stage['seconds']:.0f}" for stage in built["stages"]))
    print(f"build peak {built['peak_rss_bytes'] / 1e6:.0f} MB of {limits['peak_rss_bytes'] / 1e6:.0f} allowed")
    print(f"bundle {report['bundle']['bytes'] / 1e6:.0f} MB, dense model {size / 1e6:.0f} MB")
    for context in contexts:
        (variant,), parameters = context["variants"], context["parameters"]
        parity, speed = variant["parity"], variant["speed"]["shapes"][0]
        print(
            f"{context['name']}: {parameters['kept'] / 1e6:.1f} of {parameters['total'] / 1e6:.1f} M parameters, "
            f"parity {parity['verdict']} ({parity['max_abs_error']:.1e} of {parity['tolerance']:.1e}), "
            f"{speed['ratio']:.2f}x as fast as eager dense at {speed['batch']}x{speed['sequence']}"
        )
        del variant["placement"]  # thousands of nodes
    save(
        "pretrained",
        {
            "perplexity": perplexity,
            "steps": steps,
            "export": plain,
            "build": built,
            "limits": limits,
            "bundle": report["bundle"],
            "contexts": contexts,
        },
    )


if __name__ == "__main__":
    main()
