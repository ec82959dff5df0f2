"""`cpcompile validate` and `cpcompile report`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from cpcompile.cli.options import (
    FilePath,
    exit_with,
    model_of,
    print_report,
    validate_config,
    validation_options,
    warn_of_memory,
)
from cpcompile.core.config import BuildConfig


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=FilePath)
@click.option("--model", type=FilePath, help="Model that BUNDLE was built from.  [default: BUNDLE with .pt or .pt2]")
@validation_options
def validate(
    bundle: Path,
    model: Path | None,
    data: Path | None,
    config: Path | None,
    repro: Path | None,
    max_memory: int | None,
    as_json: bool,
    **settings: Any,
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
      onnx-dense     the dense baseline as one plain export in ONNX Runtime, timed by default
      torch-compile  the dense baseline through torch.compile
      onnx-dynamic   the graph of all contexts in ONNX Runtime, with the context as an input
      openvino       the engine's graph in OpenVINO
    """
    from cpcompile.bundle.reader import ROUTER, open_bundle
    from cpcompile.cli.console import stage_progress
    from cpcompile.pipeline.validate import validate_bundle
    from cpcompile.report import write_report

    validation = validate_config(config, **settings)
    model = model or model_of(bundle)
    if model.exists():  # if not, validation says so
        warn_of_memory(model, max_memory, BuildConfig(merged=ROUTER in open_bundle(bundle).components), validation)
    with stage_progress() as stage:
        report = validate_bundle(bundle, model, data=data, config=validation, progress=stage, repro=repro)
    print_report(report, as_json=as_json)
    if not all((validation.speed, validation.memory, validation.layers, validation.coherence)):
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
