"""The command line: thin commands over the library; errors become one sentence and an exit code.

Exit codes: 0 pass, 1 fail, 2 usage, 3 inconclusive.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import cpcompile
from cpcompile.cli.sizes import parse_size
from cpcompile.core.config import (
    CONTROLS,
    LARGEST,
    PRESETS,
    PRETRAINED_TRAIN,
    RECOVERIES,
    CheckConfig,
    ModelConfig,
    TrainConfig,
    ValidateConfig,
    load_toml,
    override,
    preset,
)
from cpcompile.core.errors import CpcompileError, UsageError, printable
from cpcompile.targets.requests import parse_targets

if TYPE_CHECKING:
    from cpcompile.check.criteria import Check
    from cpcompile.pipeline.estimation import Plan
    from cpcompile.report import Report

Command = TypeVar("Command", bound=Callable[..., Any])
FilePath = click.Path(path_type=Path)

NO_MEMORY = "not enough memory"
"""What torch's RuntimeError says of an allocation that failed."""
VERDICT_EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}


max_memory_option = click.option(
    "--max-memory",
    metavar="SIZE",
    callback=lambda _context, _option, text: None if text is None else parse_size(text),
    help="Do not start if more is needed (2GB, 1500MiB); see `estimate`.",
)


class _Group(click.Group):
    """Maps our errors to exit codes; tracebacks only with --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CpcompileError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {printable(str(error))}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if ctx.params.get("debug") or error.errno == errno.EPIPE:  # click ends quietly when nobody reads on
                raise
            where = f"{error.filename}: " if error.filename is not None else ""
            click.echo(f"Error: {where}{error.strerror or error}", err=True)
            ctx.exit(1)
        except (MemoryError, RuntimeError) as error:
            if ctx.params.get("debug") or not (isinstance(error, MemoryError) or NO_MEMORY in str(error)):
                raise
            click.echo("Error: out of memory; use a smaller model, batch or sequence", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(cpcompile.__version__, prog_name="cpcompile")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
def main(debug: bool) -> None:
    """Train one model for many contexts; compile each context into its own small, proven engine.

    \b
    cpcompile demo                                # everything below on text that you already have
    cpcompile train --data corpus/ --out model.pt
    cpcompile estimate model.pt                   # memory and size, before the work starts
    cpcompile build model.pt -o model.cpc
    cpcompile validate model.cpc --model model.pt
    cpcompile report before.json model.cpc        # what changed
    cpcompile check model.cpc --baseline base.json
    cpcompile export model.cpc english -o english.onnx
    cpcompile opt any.onnx -o smaller.onnx --check
    cpcompile compare any.onnx smaller.onnx
    cpcompile doctor                              # what works here, and what mends the rest
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows a question mark, no traceback


@main.command(context_settings={"show_default": True})
@click.option("--data", type=FilePath, required=True, help="Folder with a sub-folder or a file per context.")
@click.option("--out", "-o", type=FilePath, default="model.pt", help="Checkpoint to write.")
@click.option("--config", type=FilePath, help="TOML file with the tables [model] and [train]; flags win.")
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), help="Model shape.  [default: tiny]")
@click.option("--from-pretrained", type=FilePath, metavar="DIR", help="Folder of a Hugging Face model, or its GGUF.")
@click.option("--steps", type=int, help=f"Updates of the whole schedule.  [default: {TrainConfig.steps}]")
@click.option("--batch", type=int, help=f"Sequences per context and step.  [default: {TrainConfig.batch}]")
@click.option("--sequence", type=int, help=f"Tokens per sequence.  [default: {TrainConfig.sequence}]")
@click.option("--learning-rate", type=float, help=f"Peak of the schedule.  [default: {TrainConfig.learning_rate}]")
@click.option("--seed", type=int, help=f"Two runs with one seed are equal.  [default: {TrainConfig.seed}]")
@click.option("--ffn-budget", type=float, help="Part of the FFN blocks that a context keeps.  [default: 0.25]")
@click.option("--head-budget", type=float, help="Part of the heads that a context keeps.  [default: 0.5]")
@click.option("--recover", type=click.Choice(RECOVERIES), help="Re-fit a pretrained model after the cut.")
@click.option("--controls", default="", metavar="NAMES", help=f"Comma-separated, or 'all': {', '.join(CONTROLS)}.")
@click.option("--tokenizer", type=FilePath, help="A tokenizer.json instead of one trained on the data.")
@click.option("--text-field", default="text", help="Field of the records in .jsonl and .parquet.")
@click.option("--cache", type=FilePath, help="Folder for token ids.  [default: ~/.cache/cpcompile]")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--no-held-out", is_flag=True, help="Leave the held-out sample out of the checkpoint.")
def train(
    data: Path,
    out: Path,
    config: Path | None,
    preset_name: str | None,
    from_pretrained: Path | None,
    controls: str,
    tokenizer: Path | None,
    text_field: str,
    cache: Path | None,
    resume: bool,
    no_held_out: bool,
    ffn_budget: float | None,
    head_budget: float | None,
    **flags: Any,
) -> None:
    """Train a partitioned model, its dense baseline, and the controls that you ask for.

    \b
    Examples:
      cpcompile train --data corpus/ --out model.pt
      cpcompile train --data corpus/ --preset small --steps 20000 --controls one-mask,small-dense
      cpcompile train --data corpus/ --out model.pt --resume
      cpcompile train --data corpus/ --from-pretrained SmolLM2-135M/ --recover least-squares --steps 0

    DATA has one entry per context: a sub-folder of text files, or a .txt, .jsonl, .jsonl.gz or .parquet file.
    """
    tables = load_toml(config) if config else {}
    if from_pretrained and (preset_name or tokenizer or tables.get("model")):
        raise UsageError("--from-pretrained brings shape and tokenizer: leave --preset, [model] and --tokenizer out")
    shape = override(preset(preset_name or "tiny"), tables.get("model", {}), where=f"{config}: model")
    train_config = PRETRAINED_TRAIN if from_pretrained else TrainConfig()
    train_config = override(train_config, tables.get("train", {}), where=f"{config}: train")
    budgets = dict(train_config.budgets) | {
        kind: budget for kind, budget in (("ffn", ffn_budget), ("head", head_budget)) if budget is not None
    }
    names = CONTROLS if controls == "all" else tuple(name.strip() for name in controls.split(",") if name.strip())
    train_config = override(
        train_config, flags | {"budgets": budgets, "controls": names or train_config.controls}, where="train"
    )
    run_training(
        data,
        out,
        from_pretrained or shape,
        train_config,
        tokenizer=tokenizer,
        text_field=text_field,
        cache=cache,
        resume=resume,
        held_out=not no_held_out,
    )


def run_training(
    data: Path,
    out: Path,
    source: ModelConfig | Path,
    train_config: TrainConfig,
    *,
    tokenizer: Path | None,
    text_field: str,
    cache: Path | None,
    resume: bool,
    held_out: bool,
) -> None:
    """Corpus, training with progress, and a closing summary."""
    from cpcompile.cli.console import TrainProgress, console, print_result, stage_progress
    from cpcompile.pipeline.build import train_from_data
    from cpcompile.report import controls_table, training_summary
    from cpcompile.training.trainer import dense_path, planned_steps, work_path

    try:
        with stage_progress() as stage, TrainProgress(planned_steps(train_config)) as progress:
            checkpoint = train_from_data(
                data,
                out,
                source,
                train_config,
                tokenizer=tokenizer,
                text_field=text_field,
                cache=cache,
                resume=resume,
                held_out=held_out,
                progress=stage,
                observer=progress,
            )
    except KeyboardInterrupt:
        kept = "; go on with the same command and --resume" if work_path(out).exists() else ""
        raise CpcompileError(f"interrupted{kept}") from None
    print_result(controls_table(training_summary(checkpoint.training, checkpoint.contexts)))
    console.print(f"wrote {out} and {dense_path(out)}, its dense baseline")


@main.command(context_settings={"show_default": True})
@click.argument("model", type=FilePath)
@click.option("--out", "-o", type=FilePath, help="Bundle to write.  [default: MODEL with .cpc]")
@click.option("--contexts", help="Comma-separated names; all by default.")
@click.option("--opset", type=click.Choice(["20", "23"]), default="23", help="ONNX opset of the graphs.")
@click.option("--standalone", is_flag=True, help="Self-contained models instead of shared weights.")
@click.option("--merged", is_flag=True, help="Add one engine for all contexts, with the context as an input.")
@click.option(
    "--vocabulary-coverage",
    type=float,
    metavar="PART",
    help="Trim each context's vocabulary to the tokens that make up this part of its text (0.999, say).",
)
@click.option(
    "--target", "targets", multiple=True, help="Add engines: tensorrt, tensorrt-rtx[=sm86,sm120], cuda; repeatable."
)
@click.option("--precision", "precisions", metavar="NAMES", help="Of them: fp32, fp16, bf16.  [default: fp16]")
@click.option(
    "--profile", "profiles", multiple=True, metavar="AXIS=MIN:OPT:MAX", help="Lengths that they take; repeatable."
)
@click.option("--data", type=FilePath, help="Corpus whose held-out text replaces the checkpoint's.")
@click.option("--rounds", default=ValidateConfig.rounds, help="Interleaved timing rounds per shape.")
@click.option("--min-speed-ratio", default=0.0, help="Times as fast as eager dense that engines have to be.")
@click.option("--peers", metavar="NAMES", help="What to time beside the engines: see `validate --help`, or 'all'.")
@click.option("--no-speed", is_flag=True, help="Leave the timings out.")
@click.option("--no-memory", is_flag=True, help="Leave the memory measurements out.")
@click.option("--no-layers", is_flag=True, help="Leave the errors of single layers out.")
@click.option("--repro", type=FilePath, metavar="DIR", help="On a parity failure: folder for a minimal repro.")
@max_memory_option
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of tables.")
def build(
    model: Path,
    out: Path | None,
    contexts: str | None,
    opset: str,
    standalone: bool,
    merged: bool,
    vocabulary_coverage: float | None,
    targets: tuple[str, ...],
    precisions: str | None,
    profiles: tuple[str, ...],
    data: Path | None,
    rounds: int,
    min_speed_ratio: float,
    peers: str | None,
    no_speed: bool,
    no_memory: bool,
    no_layers: bool,
    repro: Path | None,
    max_memory: int | None,
    as_json: bool,
) -> None:
    """Compile every context of MODEL into an engine of its own, and prove it against the eager model.

    \b
    Examples:
      cpcompile build model.pt
      cpcompile build model.pt -o model.cpc --contexts english,python
      cpcompile build model.pt --merged               # for a server of many contexts
      cpcompile build model.pt --max-memory 4GB       # or stop before it starts
      cpcompile build model.pt --vocabulary-coverage 1  # only the tokens that a context's text needs
      cpcompile build model.pt --json > report.json
      cpcompile build model.pt --peers all            # time torch.compile and others too, see validate --help
      cpcompile build model.pt2                       # a module of your own, see `cpcompile.save_program`

    \b
    Engines for GPUs beside those of the CPU; TensorRT-RTX and CUDA build without one:
      cpcompile build model.pt --target tensorrt-rtx --precision fp16,bf16
      cpcompile build model.pt --target cuda          # ONNX Runtime on a GPU: cuda-fp16
      cpcompile build model.pt --target tensorrt-rtx=sm89 --profile batch=1:1:4 --profile sequence=1:128:1024
    """
    from cpcompile.cli.console import stage_progress
    from cpcompile.pipeline.build import build_bundle
    from cpcompile.pipeline.estimation import Plan

    config = _validate_config(
        rounds, min_speed_ratio, peers, no_speed=no_speed, no_memory=no_memory, layers=not no_layers
    )
    added = parse_targets(targets, _names(precisions), profiles)
    if targets and max_memory is not None:
        raise UsageError(
            "--max-memory knows what engines of the CPU take, not what TensorRT does; leave one of them out"
        )
    out = out or _beside(model, ".cpc")
    plan = Plan(contexts=_names(contexts), coverage=vocabulary_coverage, standalone=standalone, merged=merged)
    _check_memory(model, max_memory, plan, config)
    with stage_progress() as stage:
        report, bundle = build_bundle(
            model,
            out,
            contexts=plan.contexts,
            opset=int(opset),
            standalone=standalone,
            merged=merged,
            coverage=vocabulary_coverage,
            data=data,
            config=config,
            progress=stage,
            repro=repro,
            added=added,
        )
    stays = f"; {out} stays as it was" if out.exists() else ""
    click.echo(f"wrote {bundle}" + (f" (the verdict is fail{stays})" if report["verdict"] == "fail" else ""), err=True)
    _print_report(report, as_json=as_json)
    _exit(report)


@main.command(context_settings={"show_default": True})
@click.argument("model", type=FilePath)
@click.option("--contexts", help="Comma-separated names; all by default.")
@click.option("--standalone", is_flag=True, help="Of a build with --standalone.")
@click.option("--merged", is_flag=True, help="Of a build with --merged.")
@click.option("--vocabulary-coverage", type=float, metavar="PART", help="Of a build with --vocabulary-coverage.")
@click.option("--no-memory", is_flag=True, help="Of a build with --no-memory.")
@click.option("--batch", type=click.IntRange(1, LARGEST), default=1, help="Sequences of a run of the engines.")
@click.option("--sequence", type=click.IntRange(1, LARGEST), default=128, help="Tokens of each.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def estimate(
    model: Path,
    contexts: str | None,
    standalone: bool,
    merged: bool,
    vocabulary_coverage: float | None,
    no_memory: bool,
    batch: int,
    sequence: int,
    as_json: bool,
) -> None:
    """Say what a build of MODEL is going to take: peak memory per stage, engines, size of the bundle.

    The weights of MODEL are not read; what the libraries take is measured here, by building a model of one layer.

    \b
    Examples:
      cpcompile estimate model.pt
      cpcompile estimate model.pt --vocabulary-coverage 1 --json
      cpcompile estimate model.pt --batch 8 --sequence 512   # engines that run other shapes
      cpcompile build model.pt --max-memory 4GB              # and do not start if it takes more
    """
    from cpcompile.pipeline.estimation import Plan, estimate_build, render_estimate

    plan = Plan(
        contexts=_names(contexts),
        coverage=vocabulary_coverage,
        standalone=standalone,
        merged=merged,
        batch=batch,
        sequence=sequence,
    )
    estimated = estimate_build(model, plan, ValidateConfig(memory=not no_memory))
    if as_json:
        click.echo(json.dumps(estimated.to_plain(), indent=1))
        return
    from cpcompile.cli.console import print_result

    print_result(render_estimate(estimated, plan))


@main.command(context_settings={"show_default": True})
@click.argument("bundle", type=FilePath)
@click.option("--model", type=FilePath, help="What it was built from.  [default: BUNDLE with .pt or .pt2]")
@click.option("--data", type=FilePath, help="Corpus whose held-out text replaces the checkpoint's.")
@click.option("--rounds", default=ValidateConfig.rounds, help="Interleaved timing rounds per shape.")
@click.option("--min-speed-ratio", default=0.0, help="Times as fast as eager dense that engines have to be.")
@click.option("--peers", metavar="NAMES", help="What to time beside the engines: see `validate --help`, or 'all'.")
@click.option("--no-speed", is_flag=True, help="Leave the timings out.")
@click.option("--no-memory", is_flag=True, help="Leave the memory measurements out.")
@click.option("--no-layers", is_flag=True, help="Leave the errors of single layers out.")
@click.option("--repro", type=FilePath, metavar="DIR", help="On a parity failure: folder for a minimal repro.")
@max_memory_option
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of tables.")
def validate(
    bundle: Path,
    model: Path | None,
    data: Path | None,
    rounds: int,
    min_speed_ratio: float,
    peers: str | None,
    no_speed: bool,
    no_memory: bool,
    no_layers: bool,
    repro: Path | None,
    max_memory: int | None,
    as_json: bool,
) -> None:
    """Compare the engines of BUNDLE with the eager model on parity, quality, memory and speed.

    \b
    Examples:
      cpcompile validate model.cpc
      cpcompile validate model.cpc --model model.pt --data corpus/ --json
      cpcompile validate model.cpc --repro repro/     # an engine is wrong: which node, and how to see it
      cpcompile validate model.cpc --min-speed-ratio 2 --peers all

    \b
    Peers:
      torch-compile  the dense baseline through torch.compile
      onnx-dense     the dense baseline as one plain export in ONNX Runtime
      onnx-dynamic   the graph of all contexts, with the context as an input
      openvino       the engine's own graph in OpenVINO
    """
    from cpcompile.bundle.reader import ROUTER, open_bundle
    from cpcompile.cli.console import stage_progress
    from cpcompile.pipeline.build import validate_bundle
    from cpcompile.pipeline.estimation import Plan
    from cpcompile.report import write_report

    config = _validate_config(
        rounds, min_speed_ratio, peers, no_speed=no_speed, no_memory=no_memory, layers=not no_layers
    )
    model = model or _model_of(bundle)
    if model.exists():  # if not, validation says so
        _check_memory(model, max_memory, Plan(merged=ROUTER in open_bundle(bundle).components), config)
    with stage_progress() as stage:
        report = validate_bundle(bundle, model, data=data, config=config, progress=stage, repro=repro)
    _print_report(report, as_json=as_json)
    if no_speed or no_memory or no_layers:
        click.echo(f"{bundle / 'report.json'} stays as it was: not everything was measured now", err=True)
    else:
        write_report(report, bundle)
    _exit(report)


@main.command(context_settings={"show_default": True})
@click.argument("before", metavar="REPORT", type=FilePath)
@click.argument("after", metavar="[OTHER]", type=FilePath, required=False)
@click.option("--out", "-o", type=FilePath, help="Page to write (.html).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def report(before: Path, after: Path | None, out: Path | None, as_json: bool) -> None:
    """Show a report again, or what changed from REPORT to OTHER; each is a bundle or its report.json.

    \b
    Examples:
      cpcompile report model.cpc -o report.html
      cpcompile report before.json after.json
      cpcompile report before.json model.cpc -o difference.html

    The exit code is 0 whatever the verdict.
    """
    from cpcompile.files.whole_files import require_file_path
    from cpcompile.report import (
        compare_reports,
        read_report,
        render_difference,
        render_difference_page,
        render_page,
        write_text,
    )

    if out is not None:
        require_file_path(out, ".html")
    first = read_report(before)
    if after is None:
        _print_report(first, as_json=as_json)
        page = render_page(first) if out else ""
    else:
        difference = compare_reports(first, read_report(after), (str(before), str(after)))
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(difference), indent=1))
        else:
            from cpcompile.cli.console import print_result

            print_result(render_difference(difference))
        page = render_difference_page(difference) if out else ""
    if out is not None:
        click.echo(f"wrote {write_text(out, page)}", err=True)


@main.command(context_settings={"show_default": True})
@click.argument("subject", type=FilePath, metavar="BUNDLE")
@click.option(
    "--baseline", type=FilePath, required=True, help="What --update-baseline wrote; of an .onnx, an older .onnx."
)
@click.option("--model", type=FilePath, help="What it was built from.  [default: BUNDLE with .pt or .pt2]")
@click.option("--without-model", is_flag=True, help="Check sizes, counts and placement only.")
@click.option("--data", type=FilePath, help="Corpus whose held-out text replaces the checkpoint's.")
@click.option("--config", type=FilePath, help="TOML file with the table [check].  [default: cpcompile.toml, if any]")
@click.option("--rounds", type=int, help=f"Interleaved timing rounds per shape.  [default: {CheckConfig.rounds}]")
@click.option("--no-speed", is_flag=True, help="Leave the timings out.")
@click.option("--no-memory", is_flag=True, help="Leave the memory measurements out.")
@click.option("--update-baseline", is_flag=True, help="Write the baseline instead of comparing with it.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    default=["table"],
    metavar="NAME[=FILE]",
    help="table, json, junit, sarif or github, to standard output or a file; may be repeated.",
)
def check(
    subject: Path,
    baseline: Path,
    model: Path | None,
    without_model: bool,
    data: Path | None,
    config: Path | None,
    rounds: int | None,
    no_speed: bool,
    no_memory: bool,
    update_baseline: bool,
    formats: tuple[str, ...],
) -> None:
    """Measure BUNDLE and compare it with its baseline: parity, quality, sizes, memory, speed. For CI.

    \b
    Examples:
      cpcompile check model.cpc --baseline base.json --update-baseline
      cpcompile check model.cpc --baseline base.json
      cpcompile check model.cpc --baseline base.json --format table --format junit=check.xml --format sarif=check.sarif
      cpcompile check model.cpc --baseline base.json --without-model
      cpcompile check new.onnx --baseline old.onnx

    Speed is that of the engine as a multiple of the dense model's, both timed now. What misses its limit on a noisy
    value is measured again; it fails when its interval lies wholly beyond the limit. Exit codes: 0 pass, 1 fail,
    2 usage, 3 inconclusive.
    """
    from cpcompile.check.baseline import read_baseline, write_baseline
    from cpcompile.check.criteria import left_out
    from cpcompile.cli.console import stage_progress
    from cpcompile.pipeline.check import check_bundle, check_file

    targets = _targets(formats)
    own = Path("cpcompile.toml")
    file = config or (own if own.exists() else None)
    settings = override(CheckConfig(), load_toml(file).get("check", {}) if file else {}, where=f"{file}: check")
    settings = override(settings, {"rounds": rounds}, where="check")
    if subject.suffix == ".onnx":
        if update_baseline:
            raise UsageError(f"{subject}: the baseline of an ONNX file is an ONNX file; copy it to {baseline}")
        with stage_progress() as stage:
            result = check_file(subject, baseline, config=settings, speed=not no_speed, progress=stage)
    else:
        before = None if update_baseline else read_baseline(baseline)
        with stage_progress() as stage:
            now, result = check_bundle(
                subject,
                None if without_model else model or _model_of(subject),
                before,
                baseline=baseline,
                data=data,
                config=settings,
                speed=not no_speed,
                memory=not no_memory,
                progress=stage,
            )
        if update_baseline:
            _require_sound(result)
            write_baseline(now, baseline)
            click.echo(f"wrote {baseline}", err=True)
            for note in result.notes:
                click.echo(f"Warning: {note}", err=True)
            for reason, names in _by_value(left_out(now)).items():
                click.echo(f"Warning: no check will judge {', '.join(names)}: {reason}", err=True)
            return
    _print_check(result, targets)
    sys.exit(VERDICT_EXIT_CODES[result.verdict])


@main.command(context_settings={"show_default": True})
@click.argument("bundle", type=FilePath)
@click.argument("context")
@click.option("--out", "-o", type=FilePath, help="ONNX file to write.  [default: CONTEXT.onnx]")
@click.option("--variant", default="cpu-fp32", help="Engine to export.")
def export(bundle: Path, context: str, out: Path | None, variant: str) -> None:
    """Write one self-contained .onnx of CONTEXT.

    \b
    Example:
      cpcompile export model.cpc english -o english.onnx
    """
    from cpcompile.pipeline.build import export_standalone

    path = out or Path(f"{context}.onnx")
    export_standalone(bundle, context, path, variant=variant)
    click.echo(f"wrote {path} ({path.stat().st_size:,} bytes)", err=True)


@main.command(context_settings={"show_default": True})
@click.argument("model", type=FilePath)
@click.option("--out", "-o", type=FilePath, required=True, help="ONNX file to write.")
@click.option("--passes", "names", metavar="NAMES", help="Comma-separated, in order; see `cpcompile passes`.")
@click.option("--check", is_flag=True, help="Compare the outputs; write nothing if they differ.")
@click.option("--input", "inputs", type=FilePath, multiple=True, help="An .npz with inputs by name, for --check.")
@click.option("--explain", is_flag=True, help="List zero channels that had to stay, with node and reason.")
@click.option("--dump", type=FilePath, help="Folder for the graph after each pass.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def opt(
    model: Path,
    out: Path,
    names: str | None,
    check: bool,
    inputs: tuple[Path, ...],
    explain: bool,
    dump: Path | None,
    as_json: bool,
) -> None:
    """Run graph passes on any ONNX file.

    \b
    Examples:
      cpcompile opt model.onnx -o small.onnx --check
      cpcompile opt model.onnx -o small.onnx --passes fold_constants,eliminate_dead_channels --explain
      cpcompile opt all.onnx -o one.onnx --passes bind_context:context=2,fold_constants,eliminate_dead_channels

    Without --passes: what keeps inputs, outputs and the names of parameters, in the order that is best.
    """
    from cpcompile.cli.console import stage_progress
    from cpcompile.pipeline.optimize import DEFAULT, load_inputs, optimize_file
    from cpcompile.report import render_optimization

    with stage_progress() as stage:
        result = optimize_file(
            model,
            out,
            _names(names) or DEFAULT,
            check=check,
            inputs=[load_inputs(path) for path in inputs],
            dump=dump,
            progress=stage,
        )
    plain = dataclasses.asdict(result)
    if as_json:
        click.echo(json.dumps(plain, indent=1))
    else:
        from cpcompile.cli.console import print_result

        print_result(render_optimization(plain, explain=explain))
    click.echo(f"wrote {out}" if result.bytes_written else f"{out} was not written", err=True)
    sys.exit(VERDICT_EXIT_CODES[result.comparison.verdict if result.comparison is not None else "pass"])


@main.command(context_settings={"show_default": True})
@click.argument("original", type=FilePath)
@click.argument("candidate", type=FilePath)
@click.option("--input", "inputs", type=FilePath, multiple=True, help="An .npz with inputs by name; may be repeated.")
@click.option("--rounds", default=ValidateConfig.rounds, help="Interleaved timing rounds.")
@click.option("--min-speed-ratio", default=0.0, help="Times as fast as ORIGINAL that CANDIDATE has to be.")
@click.option("--no-speed", is_flag=True, help="Leave the timings out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def compare(
    original: Path,
    candidate: Path,
    inputs: tuple[Path, ...],
    rounds: int,
    min_speed_ratio: float,
    no_speed: bool,
    as_json: bool,
) -> None:
    """Compare two ONNX files: the same outputs, how large, how fast; whoever made them.

    \b
    Examples:
      cpcompile compare model.onnx smaller.onnx
      cpcompile compare model.onnx smaller.onnx --input batch.npz --min-speed-ratio 1.5

    Both run in ONNX Runtime on the CPU, on random inputs and on those given. The tolerance is measured: a multiple of
    what the runtime's own optimisations change in ORIGINAL.
    """
    from cpcompile.cli.console import stage_progress
    from cpcompile.pipeline.compare import compare_models
    from cpcompile.pipeline.optimize import load_inputs

    checked = ValidateConfig(rounds=rounds, min_speed_ratio=min_speed_ratio)
    with stage_progress() as stage:
        result = compare_models(
            original,
            candidate,
            inputs=[load_inputs(path) for path in inputs],
            rounds=None if no_speed else checked.rounds,
            min_speed_ratio=checked.min_speed_ratio,
            progress=stage,
        )
    plain = dataclasses.asdict(result) | {"verdict": result.verdict}
    if as_json:
        click.echo(json.dumps(plain, indent=1))
    else:
        from cpcompile.cli.console import print_result
        from cpcompile.report import render_file_comparison

        print_result(render_file_comparison(plain))
    sys.exit(VERDICT_EXIT_CODES[result.verdict])


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def doctor(as_json: bool) -> None:
    """Say what is installed here, which targets really work, and the commands that mend the rest.

    \b
    Examples:
      cpcompile doctor
      cpcompile doctor --json

    Each target is tried: a session, a Builder. Exit code 0 if engines for the CPU are built and run here, 1 if not.
    """
    from cpcompile.doctor.diagnosis import diagnose

    diagnosis = diagnose()
    if as_json:
        click.echo(json.dumps(diagnosis.as_json(), indent=1))
    else:
        from cpcompile.cli.console import print_result
        from cpcompile.doctor.table import render_diagnosis

        print_result(render_diagnosis(diagnosis))
    sys.exit(0 if diagnosis.healthy else 1)


@main.command()
def passes() -> None:
    """List the graph passes that `cpcompile opt --passes` can name, with their settings."""
    from cpcompile.pipeline.optimize import PASSES, settings_of

    for name, kind in PASSES.items():
        summary = (kind.__doc__ or "").strip().splitlines()[0]
        settings = "".join(f":{setting}=..." for setting in settings_of(kind))
        click.echo(f"{name + settings:<42} {summary}")


@main.command(context_settings={"show_default": True})
@click.option("--out", "-o", type=FilePath, default="demo", help="Folder for corpus, checkpoint, bundle and report.")
def demo(out: Path) -> None:
    """Train, build and validate on text that every installation has: Python, C++ and English.

    Takes about ten minutes on two cores and 2 GB of memory. Interrupted, it goes on where it was.

    \b
    Example:
      cpcompile demo --out demo
    """
    from cpcompile.cli.demo import run_demo

    _exit(run_demo(out, train=run_training, show=_print_report))


def _beside(path: Path, suffix: str) -> Path:
    """`path` with another suffix; also of `.`, which has no name."""
    path = path if path.name else path.absolute()
    return path.with_name(f"{path.stem}{suffix}") if path.name else path


def _model_of(bundle: Path) -> Path:
    """The model beside `bundle`; the .pt file if there is neither."""
    program = _beside(bundle, ".pt2")
    return program if program.exists() and not _beside(bundle, ".pt").exists() else _beside(bundle, ".pt")


def _validate_config(
    rounds: int, min_speed_ratio: float, peers: str | None, *, no_speed: bool, no_memory: bool, layers: bool
) -> ValidateConfig:
    return ValidateConfig(
        rounds=rounds,
        min_speed_ratio=min_speed_ratio,
        peers=_names(peers) or (),
        speed=not no_speed,
        memory=not no_memory,
        layers=layers,
    )


def _check_memory(model: Path, max_memory: int | None, plan: Plan, config: ValidateConfig) -> None:
    """Refuse what `max_memory` does not allow; warn of what the machine may not have."""
    from cpcompile.pipeline.estimation import check_memory

    warning = check_memory(model, max_memory, plan, config)
    if warning is not None:
        click.echo(f"Warning: {warning}", err=True)


def _names(text: str | None) -> tuple[str, ...] | None:
    """The names in a comma-separated list, each once."""
    if text is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"{text!r} names nothing; separate names by commas, or leave the option out")
    return names


def _targets(formats: tuple[str, ...]) -> list[tuple[str, Path | None]]:
    """(format, file or None for standard output) of each `--format`."""
    from cpcompile.check.formats import FORMATS

    targets = []
    for text in formats:
        name, equals, file = text.partition("=")
        if name not in FORMATS or (equals and not file):
            raise UsageError(f"--format {text}: give one of {', '.join(FORMATS)}, or one of them with =FILE")
        targets.append((name, Path(file) if file else None))
    printed = [name for name, file in targets if file is None]
    if len(printed) > 1 and (whole := [name for name in printed if name in ("json", "junit", "sarif")]):
        raise UsageError(f"--format {' and '.join(printed)} would mix on standard output; give {whole[0]}=FILE")
    return targets


def _by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    return {value: [name for name in values if values[name] == value] for value in values.values()}


def _require_sound(result: Check) -> None:
    """A baseline is what later checks hold on to."""
    wrong = [outcome for outcome in result.outcomes if outcome.verdict == "fail"]
    if wrong:
        raise CpcompileError(
            f"{wrong[0].place}: {wrong[0].name} fails ({wrong[0].reason}); the baseline stays as it was: mend the "
            "bundle first"
        )


def _print_check(result: Check, targets: Sequence[tuple[str, Path | None]]) -> None:
    """In the formats that were asked for, and for GitHub where it runs this."""
    from cpcompile.check.formats import TABLE, TEXTS, summary
    from cpcompile.check.formats.table import render_check
    from cpcompile.cli.console import print_result
    from cpcompile.files.whole_files import whole_file

    for name, file in targets:
        if file is None:
            print_result(render_check(result)) if name == TABLE else click.echo(TEXTS[name](result), nl=False)
            continue
        with whole_file(file) as temporary:
            if name == TABLE:
                with temporary.open("w", encoding="utf-8") as stream:
                    print_result(render_check(result), stream)
            else:
                temporary.write_text(TEXTS[name](result), encoding="utf-8")
    if os.environ.get("GITHUB_ACTIONS") == "true" and ("github", None) not in targets:
        click.echo(TEXTS["github"](result), nl=False, err=True)  # GitHub reads both streams
    if step := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(step).open("a", encoding="utf-8", errors="replace") as stream:
                stream.write(summary(result))
        except OSError as error:  # the verdict stands
            click.echo(f"Warning: GITHUB_STEP_SUMMARY={step}: no summary was written ({error.strerror})", err=True)


def _print_report(report: Report, *, as_json: bool = False) -> None:
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    from cpcompile.cli.console import print_result
    from cpcompile.report import render_report

    print_result(render_report(report))


def _exit(report: Report) -> None:
    sys.exit(VERDICT_EXIT_CODES[report["verdict"]])
