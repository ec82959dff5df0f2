"""A check as SARIF 2.1.0 (OASIS): a rule per criterion, a result per outcome.

Results are located at the baseline, which is the file in the repository; the engine is a logical location.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from cpcompile.check.criteria import CRITERIA, Check, Outcome
from cpcompile.core.version import __version__

SCHEMA_URI = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
Level: TypeAlias = Literal["none", "note", "warning", "error"]
KINDS: Mapping[str, tuple[str, Level]] = {
    "pass": ("pass", "none"),
    "fail": ("fail", "error"),
    "inconclusive": ("open", "warning"),
    "not measured": ("open", "warning"),
    "skipped": ("notApplicable", "none"),
    "new": ("informational", "none"),
}
"""Verdict -> kind and level (sections 3.27.9 and 3.27.10). A kind other than fail has no level, except for readers
that look at the level alone: there `open` is a warning, and its kind is left out."""


def sarif_log(check: Check) -> dict[str, Any]:
    """The log as plain containers."""
    names = list(CRITERIA)
    rules = [
        {"id": name, "shortDescription": {"text": criterion.meaning}, "name": name.title().replace("_", "")}
        for name, criterion in CRITERIA.items()
    ]
    driver = {"name": "cpcompile check", "version": __version__, "rules": rules}
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "invocations": [
            {
                "executionSuccessful": True,
                "toolExecutionNotifications": [{"message": {"text": note}, "level": "note"} for note in check.notes],
            }
        ],
        "results": [_result(check, outcome, names) for outcome in check.outcomes],
        "properties": {"verdict": check.verdict, "subject": check.subject},
    }
    return {"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [run]}


def _result(check: Check, outcome: Outcome, names: list[str]) -> dict[str, Any]:
    kind, level = KINDS[outcome.verdict]
    place = "/".join(part for part in (check.subject, outcome.context, outcome.variant) if part)
    return {
        "ruleId": outcome.criterion,
        "ruleIndex": names.index(outcome.criterion),
        **({"level": level} if kind == "open" else {"kind": kind, "level": level}),
        "message": {"text": f"{outcome.place}: {outcome.name}: {outcome.verdict}: {outcome.sentence}"},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": _uri(check.baseline)},
                    "region": {"startLine": 1},
                },
                "logicalLocations": [{"fullyQualifiedName": place, "kind": "resource"}],
            }
        ],
        "partialFingerprints": {"outcome/v1": f"{outcome.place}: {outcome.name}"},
    }


def _uri(path: str) -> str:
    """The path as a quoted URI; relative if the path is."""
    pure = PurePath(path)
    return pure.as_uri() if pure.is_absolute() else quote(pure.as_posix())
