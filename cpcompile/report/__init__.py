"""The report: what was measured, the verdict, and how it is shown.

results (of every engine), BuildResult -> contents, with the verdict -> report.json (report.schema.json)
report -> terminal -> tables
report -> page (charts, templates) -> report.html
two reports -> difference -> tables, a page
report_file writes report.json with its page, and reads reports from other sources
"""

from __future__ import annotations

from cpcompile.report.contents import (
    SCHEMA,
    SCHEMA_VERSION,
    BuildResult,
    BuildStage,
    ContextResult,
    ModelInfo,
    ParameterCounts,
    Report,
)
from cpcompile.report.difference import Difference, compare_reports
from cpcompile.report.make import make_report
from cpcompile.report.page import render_difference_page, render_page
from cpcompile.report.report_file import read_build, read_report, write_report, write_text
from cpcompile.report.terminal import controls_table, render_difference, render_report
from cpcompile.report.training_summary import TrainingSummary, mean_perplexity, summarize_training
from cpcompile.report.verdict import judge

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "BuildResult",
    "BuildStage",
    "ContextResult",
    "Difference",
    "ModelInfo",
    "ParameterCounts",
    "Report",
    "TrainingSummary",
    "compare_reports",
    "controls_table",
    "judge",
    "make_report",
    "mean_perplexity",
    "read_build",
    "read_report",
    "render_difference",
    "render_difference_page",
    "render_page",
    "render_report",
    "summarize_training",
    "write_report",
    "write_text",
]
