"""The contents of a bundle in a terminal of 80 columns or more.

Names in a bundle are a stranger's: `printable` keeps what a terminal would take for commands out of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cpcompile.core.errors import printable
from cpcompile.pipeline.inspect import Contents, ContextContents
from cpcompile.report.formats import NOTHING, count, megabytes, percent
from cpcompile.report.terminal import VERDICT_STYLE

LENGTH_AND_MORE = "context length, end ids, chat template"
DIGITS = 12
"""Hexadecimal digits of a digest that are shown."""


def render_contents(contents: Contents) -> Group:
    """The bundle, its contexts and its engines."""
    contexts = (_contexts(contents), Text(_not_recorded(contents.contexts)))
    return Group(_summary(contents), Text(), *contexts, *_engines(contents))


def _summary(contents: Contents) -> Table:
    rows = Table.grid(padding=(0, 2))
    name, contexts = printable(contents.name), len(contents.contexts)
    rows.add_row("bundle", Text(f"{name}, {megabytes(contents.bytes)}, {contexts} context{'s' * (contexts > 1)}"))
    verdict = contents.verdict
    rows.add_row("verdict", Text(verdict, style=VERDICT_STYLE[verdict]) if verdict else Text("no readable report.json"))
    checked = "all have the digests of the build" if contents.verified else "not compared with their digests (--verify)"
    rows.add_row("files", Text(f"{contents.files}, {checked}"))
    rows.add_row("checkpoint", Text(f"sha256 {_short(contents.checkpoint)}"))
    if contents.calibration is not None:
        rows.add_row("calibration", Text(f"sha256 {_short(contents.calibration)}"))
    for each in contents.weights:
        rows.add_row("weights", Text(f"sha256 {_short(each.sha256)}, {megabytes(each.bytes)}"))
    return rows


def _contexts(contents: Contents) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("context", overflow="fold")
    for column in ("parameters", "vocabulary", "cache per\ntoken", "context\nlength"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("end\nids", justify="right")
    table.add_column("chat\ntempl.")
    for context in contents.contexts:
        kept = f"{count(context.parameters)}, {percent(context.parameters / context.dense_parameters)}"
        table.add_row(*map(Text, (context.name, kept, _vocabulary(context), _cache(context), *_generation(context))))
    return table


def _vocabulary(context: ContextContents) -> str:
    if context.vocabulary is None:
        return NOTHING
    return f"{context.vocabulary.tokens:,}{' trimmed' if context.vocabulary.trimmed else ''}"


def _cache(context: ContextContents) -> str:
    if context.cache is None:
        return NOTHING
    own, dense = context.cache.bytes_per_token, context.cache.dense_bytes_per_token
    return f"{megabytes(own)}, {percent(own / dense if dense else None)}"


def _generation(context: ContextContents) -> tuple[str, str, str]:
    """Context length, end ids, chat template."""
    known = context.generation
    if known is None:
        return (NOTHING,) * 3
    length = "no limit" if known.context_length is None else f"{known.context_length:,}"
    return length, ", ".join(map(str, known.end)) or "none", "no" if known.chat_template is None else "yes"


def _not_recorded(contexts: Sequence[ContextContents]) -> str:
    """What a bundle should say of contexts that read text, but bundles from before do not."""
    text = [context for context in contexts if context.vocabulary is not None]
    missing = ["cache per token"] if any(context.cache is None for context in text) else []
    missing += [LENGTH_AND_MORE] if any(context.generation is None for context in text) else []
    return f"not recorded in this bundle: {', '.join(missing)}\n" if missing else ""


def _engines(contents: Contents) -> tuple[Table, Text]:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1))
    for column in ("context", "variant", "runtime", "precision", "provider", "size", "runs\nhere"):
        justify: Literal["left", "right"] = "right" if column == "size" else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column != "context")
    reasons = list(dict.fromkeys(each.reason for each in contents.engines if each.reason is not None))
    for each in contents.engines:
        every = len(each.contexts) == len(contents.contexts) > 1
        here = "yes" if each.reason is None else f"no ({reasons.index(each.reason) + 1})"
        name = f"{each.variant} *" if each.variant == contents.best else each.variant
        cells = ("all" if every else ", ".join(each.contexts), name, each.runtime, each.precision)
        provider = each.provider.removesuffix("ExecutionProvider") or NOTHING
        table.add_row(*map(Text, (*cells, provider, megabytes(each.bytes), here)))
    notes = (f"({number}) {printable(reason)}\n" for number, reason in enumerate(reasons, start=1))
    return table, Text("".join(["* opened unless another variant is named, or a GPU's runs here\n", *notes]))


def _short(digest: str) -> str:
    return printable(digest[:DIGITS])
