"""`cpcompile inspect`: what is in a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cpcompile.cli.options import FilePath
from cpcompile.core.errors import printable
from cpcompile.core.json_form import to_json


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=FilePath)
@click.option("--verify", is_flag=True, help="Compare the digest of every file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what is in BUNDLE and how to load it: contexts, engines, sizes, digests, cache, vocabulary.

    \b
    Examples:
      cpcompile inspect model.cpc
      cpcompile inspect model.cpc --verify
      cpcompile inspect model.cpc --json

    No engine is loaded. Without --verify only the manifest, the tokenizers and what the manifest says of engines are
    checked.
    """
    from cpcompile.pipeline.inspect import SCHEMA_VERSION, inspect_bundle

    contents = inspect_bundle(bundle, verify=verify)
    loading = contents.loading
    if as_json:
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **to_json(contents)}, indent=1))
        return
    from cpcompile.cli.console import print_result
    from cpcompile.cli.inspect_table import render_contents

    print_result(render_contents(contents))
    for name, code in (("Python", loading.python), ("C++", loading.cpp), ("Shell", loading.command)):
        if code is not None:
            lines = "".join(f"\n  {printable(line)}" for line in code.splitlines())
            click.echo(f"{name}:{lines}")  # not through rich, which would break long lines
