"""A check on GitHub: annotations, which are lines that a workflow prints, and the summary of a step in Markdown.

    ::error file=base.json,title=english cpu-fp32 perplexity::12.3 against 12.0 in the baseline …

In the message, % and line ends are escaped; in a property, : and , as well (GitHub, "Workflow commands").
"""

from __future__ import annotations

from pathlib import PurePath

from cpcompile.check.criteria import CRITERIA, Check, Outcome, show, show_change
from cpcompile.check.formats.table import missed

COMMANDS = {"fail": "error", "inconclusive": "warning", "not measured": "warning"}
SIGNS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️", "not measured": "⚠️", "skipped": "➖", "new": "🆕"}


def annotate(check: Check) -> list[str]:
    """One line for every outcome that is not a pass, and a notice with the verdict."""
    lines = [
        f"::{COMMANDS[each.verdict]} file={_property(PurePath(check.baseline).as_posix())},"
        f"title={_property(f'{each.place} {each.name}: {each.verdict}')}::{_message(each.sentence)}"
        for each in missed(check)
    ]
    return [*lines, f"::notice title=cpcompile check::{_message(f'{check.subject}: {check.verdict}')}"]


def summary(check: Check) -> str:
    """Markdown: the outcomes that are not a pass, and below them all outcomes in a collapsible table."""
    lines = [f"### {SIGNS[check.verdict]} cpcompile check: {_cell(check.subject)}: {check.verdict}", ""]
    if found := missed(check):
        lines += [*_table(found), ""]
    lines += [f"- {_cell(note)}" for note in check.notes]
    lines += ["", f"<details><summary>{len(check.outcomes)} criteria against {_cell(check.baseline)}</summary>", ""]
    return "\n".join([*lines, *_table(list(check.outcomes)), "", "</details>", ""])


def _table(outcomes: list[Outcome]) -> list[str]:
    head = ("", "criterion", "context", "variant", "baseline", "now", "change", "reason")
    rows = [head, ("---",) * len(head), *map(_row, outcomes)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _row(outcome: Outcome) -> tuple[str, ...]:
    unit = CRITERIA[outcome.criterion].unit
    cells = (
        f"{SIGNS[outcome.verdict]} {outcome.verdict}",
        outcome.name,
        outcome.context or "",
        outcome.variant or "",
        show(outcome.baseline, unit),
        show(outcome.now, unit),
        show_change(outcome),
        outcome.reason or "",
    )
    return tuple(map(_cell, cells))


def _cell(text: str) -> str:
    """`text` on one line, with HTML and Markdown escaped."""
    escaped = "".join(f"\\{sign}" if sign in "\\`*_[]|~#" else sign for sign in " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
