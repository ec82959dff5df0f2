"""An examination for the terminal: the targets, then the findings, then the commands that fix what is broken."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpcompile.doctor.examination import Examination

STYLES = {"works": "green", "builds": "yellow", "runs": "yellow", "no": "red"}
STYLES |= {"ok": "green", "absent": "dim", "broken": "bold red"}


def render_examination(examination: Examination) -> RenderableType:
    """Two tables, then each list of commands once, under the names of what it fixes."""
    targets = Table("target", "here", "limitation", box=box.SIMPLE)
    for target in examination.targets:
        here = Text(target.status, style=STYLES[target.status])
        targets.add_row(Text(target.name), here, Text(target.reason))
    findings = Table("what", "state", "version", "detail", box=box.SIMPLE)
    for finding in examination.findings:
        state = Text(finding.state, style=STYLES[finding.state])
        findings.add_row(Text(finding.name), state, Text(finding.version or ""), Text(finding.detail))
    commands, fixes = Text(), examination.fixes
    for fix, names in fixes.items():
        commands.append(f"{', '.join(names)}:\n", style="bold")
        commands.append("".join(f"  {command}\n" for command in fix))
    return Group(targets, findings, commands) if fixes else Group(targets, findings)
