"""A check in a terminal: a section per engine, with failures last, next to the prompt."""

from __future__ import annotations

from itertools import groupby

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cpcompile.check.criteria import CRITERIA, Check, Outcome, percent, show

STYLE = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "bold yellow",
    "not measured": "bold yellow",
    "skipped": "dim",
    "new": "cyan",
}
ORDER = ("pass", "skipped", "new", "not measured", "inconclusive", "fail")


def render_check(check: Check) -> Group:
    """The whole check."""
    table = Table(title=Text(f"{check.subject} against {check.baseline}"), box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "baseline", "now", "change", "allowed", "verdict"):
        table.add_column(column, justify="left" if column in ("", "verdict") else "right", no_wrap=True)
    sections = [(place, list(found)) for place, found in groupby(check.outcomes, lambda each: each.place)]
    for place, found in sorted(sections, key=lambda section: max(map(_rank, section[1]))):
        table.add_section()
        table.add_row(Text(place, style="bold"))
        for outcome in sorted(found, key=_rank):
            table.add_row(*map(Text, _cells(outcome)), Text(outcome.verdict, style=STYLE[outcome.verdict]))
    lines = [f"• {each.place} {each.name}: {each.verdict}: {each.sentence}" for each in missed(check)]
    lines += [f"– {reason}" for reason in dict.fromkeys(_reasons(check))]
    lines += [f"– {note}" for note in check.notes]
    verdict = Text(f"check: {check.verdict}", style=STYLE[check.verdict])
    return Group(table, Text("\n".join(lines)), verdict)


def missed(check: Check) -> list[Outcome]:
    """The outcomes that are neither a pass nor skipped on purpose, failures first."""
    found = [each for each in check.outcomes if each.verdict in ("fail", "inconclusive", "not measured")]
    return sorted(found, key=_rank, reverse=True)


def _rank(outcome: Outcome) -> int:
    return ORDER.index(outcome.verdict)


def _cells(outcome: Outcome) -> list[str]:
    unit = CRITERIA[outcome.criterion].unit
    return [
        f"  {outcome.name}",
        show(outcome.baseline, unit),
        show(outcome.now, unit),
        "" if outcome.change is None else percent(outcome.change),
        "" if outcome.allowed is None else percent(outcome.allowed),
    ]


def _reasons(check: Check) -> list[str]:
    """Why other values are not compared."""
    return [
        f"{outcome.verdict}: {outcome.reason}"
        for outcome in check.outcomes
        if outcome.verdict in ("skipped", "new") and outcome.reason
    ]
