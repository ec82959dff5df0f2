"""Write a report with its page; read a report from any source, validated against the schema."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpcompile.core.errors import UsageError
from cpcompile.core.json_form import from_json, to_json
from cpcompile.files.whole_files import read_text, whole_file
from cpcompile.report.contents import SCHEMA, SCHEMA_VERSION, BuildResult, Report
from cpcompile.report.page import render_page

LARGEST = 2.0**63


def write_report(report: Report, folder: Path) -> Path:
    """Write `folder`/report.json and report.html, each atomically: a reader sees the old or the new one."""
    text, page = json.dumps(to_json(report), indent=1, allow_nan=False) + "\n", render_page(report)
    write_text(folder / "report.html", page)
    return write_text(folder / "report.json", text)


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path` atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def read_report(path: Path) -> Report:
    """The report in the file `path`, or in the bundle `path`; UsageError says what is wrong with it."""
    file = path / "report.json" if path.is_dir() else path
    try:
        text = read_text(file)
        content = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    except FileNotFoundError:
        way = "; `cpcompile validate` writes one into a bundle" if path.is_dir() else ""
        raise UsageError(f"{file}: there is no such file{way}") from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: is not complete JSON ({error}); copy or write it again") from error
    if not isinstance(content, dict) or "schema_version" not in content or "contexts" not in content:
        raise UsageError(f"{file}: is not a report of cpcompile; give a bundle or its report.json")
    if content["schema_version"] != SCHEMA_VERSION:
        raise UsageError(
            f"{file}: has schema version {content['schema_version']!r}, this cpcompile reads {SCHEMA_VERSION}; "
            "write it again with `cpcompile validate`"
        )
    wrong = _misfit(content)
    if wrong is None:
        try:
            return from_json(Report, content)
        except (TypeError, KeyError, ValueError, OverflowError) as error:  # what a schema cannot say
            wrong = str(error)
    raise UsageError(
        f"{file}: does not follow the schema of reports: {wrong}; write it again with `cpcompile validate`"
    )


def read_build(folder: Path) -> BuildResult:
    """The build result from the report in the bundle `folder`, if there is a readable one."""
    try:
        return from_json(BuildResult, json.loads(read_text(folder / "report.json"))["build"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return BuildResult.without("the bundle was validated, and has no report of its build")


def _misfit(report: Mapping[str, Any]) -> str | None:
    """What is wrong with `report`, in a line; None if nothing is."""
    import jsonschema  # only foreign reports need it

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(report))
    if error is not None:
        return f"{error.json_path}: {error.message[:200]}"
    names = [context["name"] for context in report["contexts"]]
    if len(set(names)) < len(names):
        return "a context occurs twice"
    for kind, layers in (report["selection"]["kinds"] or {}).items():
        for layer in layers:
            if set(layer["kept"]) != set(names) or len({len(digits) for digits in layer["kept"].values()}) > 1:
                return f"selection of {kind}: {layer['name']} does not give a digit per unit for every context"
    training = report["training"]
    if training is None:
        return None
    if not training["controls"] or len({tuple(branch["perplexity"]) for branch in training["controls"].values()}) > 1:
        return "training: the branches have no perplexities, or those of different contexts"
    swap = training["swap_matrix"]
    if swap and {len(swap["contexts"])} != {len(swap["perplexity"]), *map(len, swap["perplexity"])}:
        return "training: the swap matrix is not square"
    if swap and any(row[index] is None for index, row in enumerate(swap["perplexity"])):
        return "training: the swap matrix does not have the own units of every context"
    return None


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= LARGEST:
        raise ValueError(f"{text[:20]}… is too large")
    return int(text)
