"""The report: what was measured, the verdict, and how it is shown.

ContextResult …, BuildResult -> contents -> report.json (report.schema.json is its contract)
report -> terminal -> tables
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
    write_report,
)
from cpcompile.report.terminal import controls_table, render_file_comparison, render_optimization, render_report

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "BuildResult",
    "BuildStage",
    "ContextResult",
    "Report",
    "build_of",
    "controls_table",
    "judge",
    "make_report",
    "mean_perplexity",
    "render_file_comparison",
    "render_optimization",
    "render_report",
    "training_summary",
    "write_report",
]
