"""A check for people and for the systems that run it: name -> text.

Verdicts in the terms of these formats: fail is a failure or an error; inconclusive and not measured are warnings, in
JUnit skipped tests with the reason, because a noisy machine should not fail a CI run through the XML; exit code 3
tells them from a pass. skipped was requested; new is a note.
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
"""All formats except the table, which rich draws."""
__all__ = ["FORMATS", "TABLE", "TEXTS", "summary"]

FORMATS = (TABLE, *TEXTS)
