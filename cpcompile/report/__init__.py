"""The report: what was measured, the verdict, and how it is shown.

ContextResult …, BuildResult -> contents -> report.json (report.schema.json is its contract)
report -> terminal -> tables
    report -> page (charts, templates) -> report.html
    two reports -> difference -> tables, a page
    report_file writes report.json with its page, and reads what others wrote
"""

from __future__ import annotations

from cpcompile.report.contents import (
    SCHEMA,
    SCHEMA_VERSION,
    BuildResult,
    BuildStage,
    ContextResult,
    Report,
    build_of,
    judge,
    make_report,
    mean_perplexity,
    training_summary,
)
from cpcompile.report.difference import Difference, compare_reports
from cpcompile.report.page import render_difference_page, render_page
from cpcompile.report.report_file import read_report, write_report, write_text
from cpcompile.report.terminal import (
    controls_table,
    render_difference,
    render_file_comparison,
    render_optimization,
    render_report,
)

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "BuildResult",
    "BuildStage",
    "ContextResult",
    "Difference",
    "Report",
    "build_of",
    "compare_reports",
    "controls_table",
    "judge",
    "make_report",
    "mean_perplexity",
    "read_report",
    "render_difference",
    "render_difference_page",
    "render_file_comparison",
    "render_optimization",
    "render_page",
    "render_report",
    "training_summary",
    "write_report",
    "write_text",
]
