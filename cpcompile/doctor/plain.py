"""An examination as plain text, for machines that lack what its tables are drawn with."""

from __future__ import annotations

from cpcompile.doctor.examination import Examination


def plain_examination(examination: Examination) -> str:
    """A line per target and per finding, then the commands that fix what is broken."""
    lines = [f"{each.name:<22} {each.status:<7} {each.reason}" for each in examination.targets]
    lines.append("")
    lines += [f"{each.name:<22} {each.state:<7} {each.version or '-'} {each.detail}" for each in examination.findings]
    for fix, names in examination.fixes.items():
        lines += ["", f"{', '.join(names)}:", *(f"  {command}" for command in fix)]
    return "\n".join(line.rstrip() for line in lines)
