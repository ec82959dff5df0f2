from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from cpcompile.report import controls_table, render_report
from tests.unit.report.reports import complete, report, variant


def text_of(renderable: Any, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_the_terminal_shows_what_the_report_holds() -> None:
    text = text_of(render_report(complete()))
    for part in (
        "of 4.00 M",
        "25%",
        "of 1.6e-05",
        "dense 20.00",
        "150.0 MB",
        "600.0 MB",
        "1×128: 3.00 (2.90–3.10)",
        "1×1: 0.25 ms",
        "tensorrt [the library] is not installed",
        "loses to small-dense",
        "built in 12.5 s, peak 300.0 MB",
        "verdict: pass",
    ):
        assert part in text, part
    failed = text_of(render_report(report(variant(), bundle_bytes=200_011)))
    assert "verdict: fail" in failed and "200,011 bytes are more than" in failed


def test_no_sentence_is_lost_on_a_narrow_terminal() -> None:
    words = text_of(render_report(complete()), width=80).split()
    for finding in complete()["training"]["findings"]:
        assert " ".join(finding.split()) in " ".join(words)


def test_a_checkpoint_without_training_results_says_so() -> None:
    assert "records no training results" in text_of(controls_table(None))
