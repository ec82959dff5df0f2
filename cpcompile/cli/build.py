"""`cpcompile build` and `cpcompile estimate`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from cpcompile.cli.options import (
    FilePath,
    beside,
    exit_with,
    names_in,
    print_report,
    validate_config,
    validation_options,
    warn_of_memory,
)
from cpcompile.core.config import LARGEST, OPSETS, SEARCH_SECONDS, BuildConfig, ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.paths import calibration_path
from cpcompile.targets.requests import parse_targets


@click.command(context_settings={"show_default": True})
@click.argument("model", type=FilePath)
@click.option("--out", "-o", type=FilePath, help="Bundle to write.  [default: MODEL with .cpc]")
@click.option("--contexts", help="Comma-separated names.  [default: all]")
@click.option(
    "--opset",
    type=click.Choice([str(each) for each in OPSETS]),
    default=str(BuildConfig.opset),
    help="ONNX opset of the graphs; 20 has no operators for attention and rotations, and is slower.",
)
@click.option("--standalone", is_flag=True, help="Self-contained models instead of shared weights.")
@click.option(
    "--standard-operators", is_flag=True, help="Only operators of the ONNX standard, for other runtimes; slower."
)
@click.option("--merged", is_flag=True, help="Add one engine for all contexts, with the context as an input.")
@click.option(
    "--vocabulary-coverage",
    type=float,
    metavar="PART",
    help="Trim each context's vocabulary to the tokens that make up this part of its text (such as 0.999).",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Add engines: best, cpu, openvino, tensorrt, tensorrt-rtx[=sm86,sm120], cuda; repeatable.",
)
@click.option(
    "--precision",
    "precisions",
    metavar="NAMES",
    help="Precisions of the added engines: int8, int7, int8-weights, int4-weights of cpu and best; fp32, bf16 of "
    "openvino, where bf16 needs a processor with bfloat16; fp32, fp16, bf16 of the others; int4-weights of "
    "tensorrt-rtx, too.  "
    "[default: int8 of cpu, all of best, bf16 of openvino, fp16 of the others]",
)
@click.option(
    "--search-seconds",
    type=float,
    help=f"After how long --target best tries no more mixtures of precisions.  [default: {SEARCH_SECONDS:.0f}]",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="AXIS=MIN:OPT:MAX",
    help="Axis lengths that the added engines accept; repeatable.",
)
@click.option("--rebuild", is_flag=True, help="Build and measure everything again, even if nothing has changed.")
@click.option("--no-validate", is_flag=True, help="Only build; the report then says that nothing was validated.")
@validation_options
def build(
    model: Path,
    out: Path | None,
    contexts: str | None,
    opset: str,
    standalone: bool,
    standard_operators: bool,
    merged: bool,
    vocabulary_coverage: float | None,
    targets: tuple[str, ...],
    precisions: str | None,
    search_seconds: float | None,
    rebuild: bool,
    no_validate: bool,
    profiles: tuple[str, ...],
    data: Path | None,
    config: Path | None,
    repro: Path | None,
    max_memory: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compile every context of MODEL into an engine of its own, and validate it against the eager model.

    \b
    Examples:
      cpcompile build model.pt
      cpcompile build model.pt -o model.cpc --contexts english,python
      cpcompile build model.pt --merged               # for a server of many contexts
      cpcompile build model.pt --max-memory 4GB       # refuse to start above 4 GB
      cpcompile build model.pt --vocabulary-coverage 1  # only the tokens that occur in a context's text
      cpcompile build model.pt --json > report.json
      cpcompile build model.pt --no-validate          # validate it later, or elsewhere: cpcompile validate model.cpc
      cpcompile build model.pt --rebuild              # although nothing changed since the bundle was built
      cpcompile build model.pt --peers all            # also time torch.compile and others, see validate --help
      cpcompile build model.pt --max-perplexity-increase 0.05   # 5 % above the dense baseline is no failure
      cpcompile build model.pt2                       # your own module, see `cpcompile.save_program`

    \b
    Engines with low-bit weights are added alongside those in float32:
      cpcompile build model.pt --target cpu           # cpu-int8: products of 8-bit integers
      cpcompile build model.pt --target cpu --precision int8-weights,int4-weights
      cpcompile build model.pt --target best --max-perplexity-increase 0.01   # the fastest of all within that budget

    \b
    OpenVINO engines read the weights of the engines in float32, and add only their graphs:
      cpcompile build model.pt --target openvino      # openvino-bf16, for processors with bfloat16
      cpcompile build model.pt --target openvino --precision fp32,bf16

    \b
    GPU engines are added alongside the CPU engines; TensorRT-RTX and CUDA engines can be built without a GPU:
      cpcompile build model.pt --target tensorrt-rtx --precision fp16,bf16
      cpcompile build model.pt --target cuda          # ONNX Runtime on a GPU: cuda-fp16
      cpcompile build model.pt --target tensorrt-rtx=sm89 --profile batch=1:1:4 --profile sequence=1:128:1024
    """
    from cpcompile.cli.console import clock, stage_progress
    from cpcompile.pipeline.up_to_date import finished_report

    plan = BuildConfig(
        contexts=names_in(contexts),
        opset=int(opset),
        standalone=standalone,
        standard_operators=standard_operators,
        merged=merged,
        vocabulary_coverage=vocabulary_coverage,
        targets=targets,
        precisions=names_in(precisions),
        search_seconds=search_seconds,
        validate=not no_validate,
        profiles=profiles,
    )
    validation = validate_config(config, **settings)
    added = parse_targets(plan.targets, plan.precisions, plan.profiles, plan.search_seconds)
    if targets and max_memory is not None:
        raise UsageError("--max-memory covers CPU engines only, not the engines of --target; leave one of them out")
    out = out or beside(model, ".cpc")
    if out.suffix in (".onnx", ".pt", ".pt2"):
        raise UsageError(f"{out}: a bundle is a folder; give a name such as {out.with_suffix('.cpc').name}")
    if not rebuild and (finished := finished_report(model, out, plan, validation, data)) is not None:
        click.echo(f"{out} is up to date: nothing that it depends on has changed (--rebuild builds it again)", err=True)
        print_report(finished, as_json=as_json)
        if not no_validate:
            exit_with(finished)
        return
    warn_of_memory(model, max_memory, plan, validation)
    if added.rounded:
        click.echo(_where_rounded_weights_come_from(calibration_path(model)), err=True)
    started = time.perf_counter()
    from cpcompile.pipeline.build import build_bundle  # imports torch

    with stage_progress() as stage:
        report, bundle = build_bundle(
            model, out, plan, validation, progress=stage, data=data, repro=repro, keep=not rebuild
        )
    what = "build" if no_validate else "build and validation"
    click.echo(f"{what} took {clock(time.perf_counter() - started)}", err=True)
    stays = f"; {out} is unchanged" if out.exists() else ""
    warn_without_cache(bundle)
    click.echo(f"wrote {bundle}" + (f" (the verdict is fail{stays})" if report.verdict == "fail" else ""), err=True)
    print_report(report, as_json=as_json)
    if not no_validate:
        exit_with(report)


def _where_rounded_weights_come_from(calibration: Path) -> str:
    if calibration.exists():
        return f"weights are rounded as {calibration} says: keep it for `validate` and `check`"
    return "weights are rounded to the nearest numbers; `cpcompile calibrate` finds better ones"


def warn_without_cache(bundle: Path) -> None:
    """Say so if the engines of a language model have no cache, because the model's own could not be read."""
    from cpcompile.bundle import open_bundle

    opened = open_bundle(bundle)
    if opened.metadata["tokenizers"] and all(opened.cache(context) is None for context in opened.contexts):
        click.echo("Warning: the model has no cache that can be captured; each token computes the whole text", err=True)


@click.command(context_settings={"show_default": True})
@click.argument("model", type=FilePath)
@click.option("--contexts", help="Comma-separated names.  [default: all]")
@click.option("--standalone", is_flag=True, help="Estimate a build with --standalone.")
@click.option("--merged", is_flag=True, help="Estimate a build with --merged.")
@click.option("--vocabulary-coverage", type=float, metavar="PART", help="Estimate a build with --vocabulary-coverage.")
@click.option("--no-memory", is_flag=True, help="Estimate a build with --no-memory.")
@click.option("--jobs", type=int, default=1, help="Estimate a build with --jobs.")
@click.option("--batch", type=click.IntRange(1, LARGEST), default=1, help="Sequences per engine run.")
@click.option("--sequence", type=click.IntRange(1, LARGEST), default=128, help="Tokens per sequence.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def estimate(
    model: Path,
    contexts: str | None,
    standalone: bool,
    merged: bool,
    vocabulary_coverage: float | None,
    no_memory: bool,
    jobs: int,
    batch: int,
    sequence: int,
    as_json: bool,
) -> None:
    """Estimate a build of MODEL: time, peak memory of each stage and engine, and the size of the bundle.

    The weights of MODEL are not read. The memory that the libraries take is measured by building a one-layer model.

    \b
    Examples:
      cpcompile estimate model.pt
      cpcompile estimate model.pt --vocabulary-coverage 1 --json
      cpcompile estimate model.pt --batch 8 --sequence 512   # engines that run larger shapes
      cpcompile build model.pt --max-memory 4GB              # refuse to start above 4 GB
    """
    from cpcompile.cli.console import stage_progress
    from cpcompile.pipeline.estimation import RunShape, estimate_build, render_estimate

    config = BuildConfig(
        contexts=names_in(contexts),
        standalone=standalone,
        merged=merged,
        vocabulary_coverage=vocabulary_coverage,
    )
    shape = RunShape(batch=batch, sequence=sequence)
    with stage_progress() as stage:
        estimated = estimate_build(model, config, ValidateConfig(memory=not no_memory, jobs=jobs), shape, stage)
    if as_json:
        click.echo(json.dumps(estimated.to_plain(), indent=1))
        return
    from cpcompile.cli.console import print_result

    print_result(render_estimate(estimated, shape))
