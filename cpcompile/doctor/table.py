"""A diagnosis for a terminal: targets first, then what was found, then the commands that mend something."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpcompile.doctor.diagnosis import Diagnosis

STYLES = {"works": "green", "builds": "yellow", "runs": "yellow", "no": "red"}
STYLES |= {"ok": "green", "absent": "dim", "broken": "bold red"}


def render_diagnosis(diagnosis: Diagnosis) -> RenderableType:
    """Two tables; commands under the names of what they mend, each once."""
    targets = Table("target", "here", "why not more", box=box.SIMPLE)
    for target in diagnosis.targets:
        here = Text(target.status, style=STYLES[target.status])
        targets.add_row(Text(target.name), here, Text(target.reason))
    findings = Table("what", "state", "version", "detail", box=box.SIMPLE)
    for finding in diagnosis.findings:
        state = Text(finding.state, style=STYLES[finding.state])
        findings.add_row(Text(finding.name), state, Text(finding.version or ""), Text(finding.detail))
    broken = [finding for finding in diagnosis.findings if finding.state == "broken"]
    mended: dict[tuple[str, ...], list[str]] = {}
    for name, fix in [(each.name, each.fix) for each in broken] + [(each.name, each.fix) for each in diagnosis.targets]:
        if fix:
            mended.setdefault(fix, []).append(name)
    commands = Text()
    for fix, names in mended.items():
        commands.append(f"{', '.join(dict.fromkeys(names))}:\n", style="bold")
        commands.append("".join(f"  {command}\n" for command in fix))
    return Group(targets, findings, commands) if mended else Group(targets, findings)
