"""A check for people and for the systems that run it: name -> text.

Verdicts in other people's words: fail is a failure or an error. inconclusive and not measured are warnings, in JUnit
skipped tests with the reason: a noisy machine shall not turn a CI run red through the XML; the exit code 3 tells
both apart. skipped was asked for; new is a note.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType

from cpcompile.check.criteria import Check
from cpcompile.check.formats.github import annotate, summary
from cpcompile.check.formats.junit import junit_xml
from cpcompile.check.formats.sarif import sarif_log

TABLE = "table"
TEXTS: Mapping[str, Callable[[Check], str]] = MappingProxyType(
    {
        "json": lambda check: json.dumps(check.plain(), indent=1, allow_nan=False) + "\n",
        "junit": junit_xml,
        "sarif": lambda check: json.dumps(sarif_log(check), indent=1) + "\n",
        "github": lambda check: "".join(f"{line}\n" for line in annotate(check)),
    }
)
"""All formats but the table, which rich draws."""
__all__ = ["FORMATS", "TABLE", "TEXTS", "summary"]

FORMATS = (TABLE, *TEXTS)
