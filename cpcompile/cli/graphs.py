"""Commands on single graphs: `export`, `opt`, `compare`, `passes`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from cpcompile.cli.options import VERDICT_EXIT_CODES, FilePath, names_in
from cpcompile.core.config import (
    ValidateConfig,
)
from cpcompile.core.errors import UsageError
from cpcompile.core.json_form import to_json


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=FilePath)
@click.argument("contexts", metavar="CONTEXT[,CONTEXT...]")
@click.option("--out", "-o", type=FilePath, help="What to write; see --format.  [default: CONTEXT.onnx]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", "genai", "triton"]),
    default="onnx",
    help="onnx: a self-contained file. genai: a folder for ONNX Runtime GenAI. triton: a model repository for Triton.",
)
@click.option("--variant", default="cpu-fp32", help="Engine to export; best is what --target best chose.")
@click.option("--no-tokenizer", is_flag=True, help="With genai: leave out the tokenizer of GenAI.")
def export(bundle: Path, contexts: str, out: Path | None, form: str, variant: str, no_tokenizer: bool) -> None:
    """Write engines in the form that other programs read.

    \b
    Examples:
      cpcompile export model.cpc english -o english.onnx
      cpcompile export model.cpc english --format genai -o english-genai/
      cpcompile export model.cpc english,python --format genai -o genai/
      cpcompile export model.cpc english,python --format triton -o repository/

    Several contexts are written side by side, each into a folder of its own name. With genai they share one file of
    weights. A folder that exists is never overwritten.
    """
    names = names_in(contexts) or ()
    if no_tokenizer and form != "genai":
        raise UsageError("--no-tokenizer belongs to --format genai; leave it out")
    if form == "onnx":
        from cpcompile.pipeline.export import export_standalone

        if len(names) > 1:
            raise UsageError(f"{contexts}: --format onnx writes one file of one context; export them one by one")
        path = out or Path(f"{names[0]}.onnx")
        engine = export_standalone(bundle, names[0], path, variant=variant)
        click.echo(f"wrote {path} ({path.stat().st_size:,} bytes)", err=True)
        _warn_of_options(engine.session_options)
        return
    if out is None:
        raise UsageError(f"--format {form} writes a folder; name it with --out")
    from cpcompile.pipeline.export_folders import export_genai_folder, export_triton_repository

    if form == "genai":
        export_genai_folder(bundle, names, out, variant=variant, tokenizer=not no_tokenizer)
    else:
        _warn_of_options(export_triton_repository(bundle, names, out, variant=variant).session_options)
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    click.echo(f"wrote {out} ({total:,} bytes)", err=True)


def _warn_of_options(options: Mapping[str, str]) -> None:
    """Say which session options an exported engine needs: a file of ONNX cannot hold them."""
    for name, value in options.items():
        click.echo(f"Warning: run it with the session option {name}={value}, or its results differ", err=True)


@click.command(context_settings={"show_default": True})
@click.argument("model", type=FilePath)
@click.option("--out", "-o", type=FilePath, required=True, help="ONNX file to write.")
@click.option("--passes", "names", metavar="NAMES", help="Comma-separated, in order; see `cpcompile passes`.")
@click.option(
    "--check/--no-check",
    default=None,
    help="Compare the outputs on many inputs, or not at all.  [default: on a few inputs]",
)
@click.option(
    "--input", "inputs", type=FilePath, multiple=True, help="An .npz with inputs by name, to compare on; repeatable."
)
@click.option("--explain", is_flag=True, help="List zero channels that could not be removed, with node and reason.")
@click.option("--dump", type=FilePath, help="Folder that receives the graph after each pass.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def opt(
    model: Path,
    out: Path,
    names: str | None,
    check: bool | None,
    inputs: tuple[Path, ...],
    explain: bool,
    dump: Path | None,
    as_json: bool,
) -> None:
    """Run graph passes on any ONNX file.

    \b
    Examples:
      cpcompile opt model.onnx -o small.onnx
      cpcompile opt model.onnx -o small.onnx --passes fold_constants,eliminate_dead_channels --explain
      cpcompile opt all.onnx -o one.onnx --passes bind_context:context=2,fold_constants,eliminate_dead_channels

    Without --passes, the passes that keep inputs, outputs and parameter names run in the recommended order. The outputs
    of both files are compared, and nothing is written if they differ.
    """
    from cpcompile.cli.console import stage_progress
    from cpcompile.files.arrays import load_inputs
    from cpcompile.passes.bind_context import BindContext
    from cpcompile.pipeline.optimize import DEFAULT, optimize_file, parse_pass

    chosen = names_in(names) or DEFAULT
    bound = {each.name for each in map(parse_pass, chosen) if isinstance(each, BindContext)}
    with stage_progress() as stage:
        result = optimize_file(
            model,
            out,
            chosen,
            check="quick" if check is None else "thorough" if check else "none",
            inputs=[load_inputs(path, model, bound=bound) for path in inputs],
            dump=dump,
            progress=stage,
        )
    if as_json:
        click.echo(json.dumps(to_json(result), indent=1))
    else:
        from cpcompile.cli.console import print_result
        from cpcompile.cli.graph_tables import render_optimization

        print_result(render_optimization(result, explain=explain))
    for reason in result.skipped:
        click.echo(f"skipped: {reason}", err=True)
    if wrong := result.contradictions:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        click.echo(f"note: {model} is wrong about its own values, which is not used: {wrong[0]}{more}", err=True)
    click.echo(f"wrote {out}" if result.bytes_written else f"{out} was not written", err=True)
    verdict = result.comparison.verdict if result.comparison is not None else "pass"
    decided = verdict != "inconclusive" or check  # without --check, a file that cannot be compared is no failure
    sys.exit(VERDICT_EXIT_CODES[verdict] if decided else 0)


@click.command(context_settings={"show_default": True})
@click.argument("original", type=FilePath)
@click.argument("candidate", type=FilePath)
@click.option("--input", "inputs", type=FilePath, multiple=True, help="An .npz with inputs by name; repeatable.")
@click.option("--rounds", default=ValidateConfig.rounds, help="Interleaved timing rounds.")
@click.option("--min-speed-ratio", default=0.0, help="Minimum speedup of CANDIDATE over ORIGINAL.")
@click.option("--no-speed", is_flag=True, help="Skip the timings.")
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
    """Compare the outputs, sizes and speed of any two ONNX files.

    \b
    Examples:
      cpcompile compare model.onnx smaller.onnx
      cpcompile compare model.onnx smaller.onnx --input batch.npz --min-speed-ratio 1.5

    Both run in ONNX Runtime on the CPU, on random inputs and on those given. The tolerance is a multiple of the
    difference that the runtime's own optimisations make to ORIGINAL.
    """
    from cpcompile.cli.console import stage_progress
    from cpcompile.files.arrays import load_inputs
    from cpcompile.pipeline.compare import compare_models

    checked = ValidateConfig(rounds=rounds, min_speed_ratio=min_speed_ratio, speed=not no_speed)
    with stage_progress() as stage:
        result = compare_models(
            original,
            candidate,
            inputs=[load_inputs(path, original) for path in inputs],
            rounds=checked.rounds if checked.speed else None,
            min_speed_ratio=checked.min_speed_ratio,
            progress=stage,
        )
    if as_json:
        click.echo(json.dumps(to_json(result) | {"verdict": result.verdict}, indent=1))
    else:
        from cpcompile.cli.console import print_result
        from cpcompile.cli.graph_tables import render_file_comparison

        print_result(render_file_comparison(result))
    sys.exit(VERDICT_EXIT_CODES[result.verdict])


@click.command()
def passes() -> None:
    """List the graph passes that `cpcompile opt --passes` can name, with their settings."""
    from cpcompile.pipeline.optimize import PASSES, settings_of

    for name, kind in PASSES.items():
        summary = (kind.__doc__ or "").strip().splitlines()[0]
        settings = "".join(f":{setting}=..." for setting in settings_of(kind))
        click.echo(f"{name + settings:<42} {summary}")
