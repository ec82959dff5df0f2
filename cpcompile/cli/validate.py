"""`cpcompile validate` and `cpcompile report`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from cpcompile.cli.options import (
    FilePath,
    exit_with,
    max_memory_option,
    model_of,
    print_report,
    validate_config,
    warn_of_memory,
)
from cpcompile.core.config import (
    BuildConfig,
    ValidateConfig,
)


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=FilePath)
@click.option("--model", type=FilePath, help="Model that BUNDLE was built from.  [default: BUNDLE with .pt or .pt2]")
@click.option("--data", type=FilePath, help="Corpus whose held-out text replaces that of the checkpoint.")
@click.option("--rounds", default=ValidateConfig.rounds, help="Interleaved timing rounds per shape.")
@click.option("--min-speed-ratio", default=0.0, help="Minimum speedup over the eager dense model.")
@click.option("--peers", metavar="NAMES", help="Peers to time with the engines, or 'all'; see `validate --help`.")
@click.option("--no-speed", is_flag=True, help="Skip the timings.")
@click.option("--no-memory", is_flag=True, help="Skip the memory measurements.")
@click.option("--no-layers", is_flag=True, help="Skip the errors of single layers.")
@click.option("--repro", type=FilePath, metavar="DIR", help="Folder for a minimal repro if parity fails.")
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
      cpcompile validate model.cpc --repro repro/     # if an engine is wrong: which node, and a repro
      cpcompile validate model.cpc --min-speed-ratio 2 --peers all

    \b
    Peers:
      torch-compile  the dense baseline through torch.compile
      onnx-dense     the dense baseline as one plain export in ONNX Runtime
      onnx-dynamic   the graph of all contexts in ONNX Runtime, with the context as an input
      openvino       the engine's own graph in OpenVINO
    """
    from cpcompile.bundle.reader import ROUTER, open_bundle
    from cpcompile.cli.console import stage_progress
    from cpcompile.pipeline.validate import validate_bundle
    from cpcompile.report import write_report

    config = validate_config(
        rounds, min_speed_ratio, peers, no_speed=no_speed, no_memory=no_memory, layers=not no_layers
    )
    model = model or model_of(bundle)
    if model.exists():  # if not, validation says so
        warn_of_memory(model, max_memory, BuildConfig(merged=ROUTER in open_bundle(bundle).components), config)
    with stage_progress() as stage:
        report = validate_bundle(bundle, model, data=data, config=config, progress=stage, repro=repro)
    print_report(report, as_json=as_json)
    if no_speed or no_memory or no_layers:
        click.echo(f"{bundle / 'report.json'} is unchanged: not everything was measured this time", err=True)
    else:
        write_report(report, bundle)
    exit_with(report)


@click.command(context_settings={"show_default": True})
@click.argument("before", metavar="REPORT", type=FilePath)
@click.argument("after", metavar="[OTHER]", type=FilePath, required=False)
@click.option("--out", "-o", type=FilePath, help="Page to write (.html).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def report(before: Path, after: Path | None, out: Path | None, as_json: bool) -> None:
    """Show a report, or compare two reports, ignoring noise; each is a bundle or its report.json.

    \b
    Examples:
      cpcompile report model.cpc -o report.html
      cpcompile report before.json after.json
      cpcompile report before.json model.cpc -o difference.html

    The exit code is 0 for every verdict.
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
        print_report(first, as_json=as_json)
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
