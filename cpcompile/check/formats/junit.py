"""A check as JUnit XML: a suite per context and one for the bundle, a test per engine and criterion.

The dialect is Jenkins' junit-10.xsd (jenkinsci/xunit-plugin), which pytest, GitLab and GitHub's reporters read.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from cpcompile.check.criteria import Check, Outcome

NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not allow (section 2.2)."""


def junit_xml(check: Check) -> str:
    """The document, with its declaration."""
    root = ElementTree.Element("testsuites", name="cpcompile check")
    suites: dict[str, list[Outcome]] = {}
    for outcome in check.outcomes:
        suites.setdefault(outcome.context or "bundle", []).append(outcome)
    for name, outcomes in suites.items():
        suite = ElementTree.SubElement(root, "testsuite", _counts(outcomes) | {"name": _clean(name)})
        for outcome in outcomes:
            _test(suite, check, outcome)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _counts(outcomes: list[Outcome]) -> dict[str, str]:
    verdicts = [_kind(outcome) for outcome in outcomes]
    return {
        "tests": str(len(outcomes)),
        "failures": str(verdicts.count("failure")),
        "errors": "0",
        "skipped": str(verdicts.count("skipped")),
    }


def _kind(outcome: Outcome) -> str | None:
    """The child element of a test that did not pass."""
    return {"pass": None, "new": None, "fail": "failure"}.get(outcome.verdict, "skipped")


def _test(suite: ElementTree.Element, check: Check, outcome: Outcome) -> None:
    parts = (Path(check.subject).name, outcome.context, outcome.variant)
    classname = _clean(".".join(part for part in parts if part))
    test = ElementTree.SubElement(suite, "testcase", name=_clean(outcome.name), classname=classname)
    kind, sentence = _kind(outcome), _clean(f"{outcome.place}: {outcome.name}: {outcome.sentence}")
    if kind is not None:
        element = ElementTree.SubElement(test, kind, message=f"{outcome.verdict}: {sentence}", type=outcome.verdict)
        element.text = sentence
    elif outcome.verdict == "new":
        ElementTree.SubElement(test, "system-out").text = sentence


def _clean(text: str) -> str:
    return NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
