"""An estimate for a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpcompile.pipeline.estimation.formula import NOT_COUNTED, Estimate, RunShape
from cpcompile.report.formats import megabytes


def render_estimate(estimated: Estimate, shape: RunShape) -> RenderableType:
    """A row per stage and per process, and the size of the bundle."""
    stages = Table("stage", "peak RSS", "of that", box=box.SIMPLE)
    stages.columns[1].justify = "right"
    for stage in (*estimated.build, *estimated.validation):
        parts = ", ".join(f"{what} {megabytes(size)}" for what, size in stage.parts.items())
        style = "bold" if stage is estimated.largest else None
        stages.add_row(Text(stage.name), megabytes(stage.peak_rss_bytes), Text(parts), style=style)
    processes = Table("process", "loading", "running", box=box.SIMPLE)
    rows = dict(estimated.engines) | ({"eager model": estimated.eager} if estimated.eager else {})
    for column in processes.columns[1:]:
        column.justify = "right"
    for name, process in rows.items():
        processes.add_row(Text(name), megabytes(process.load_peak_rss_bytes), megabytes(process.run_peak_rss_bytes))
    closing = Text(f"bundle: {megabytes(estimated.bundle_bytes)}; here the build takes {estimated.duration}\n")
    closing.append(
        f"Running: {shape.batch}×{shape.sequence} tokens; programs run with the shapes of their examples. ", style="dim"
    )
    closing.append("Not counted: " + ", ".join(NOT_COUNTED), style="dim")
    return Group(stages, processes, closing)
