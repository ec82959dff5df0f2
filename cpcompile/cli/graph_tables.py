"""Results of `opt` and `compare` in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpcompile.files.onnx_file import Size
from cpcompile.pipeline.compare import FileComparison
from cpcompile.pipeline.optimize import Optimization
from cpcompile.report.formats import number
from cpcompile.report.results import ratio_with_bounds
from cpcompile.report.terminal import VERDICT_STYLE
from cpcompile.validation.output_comparison import Comparison, OutputComparison


def render_optimization(result: Optimization, *, explain: bool) -> Group:
    """What `cpcompile opt` did: size after every pass, compared outputs, remaining zero channels."""
    table = Table(box=box.SIMPLE)
    for column in ("pass", "nodes", "parameters", "bytes", "seconds"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    before: tuple[str, Size, float | None] = ("(before)", result.before, None)
    for name, size, seconds in (before, *((s.name, s.size, s.seconds) for s in result.steps)):
        cells = (str(size.nodes), f"{size.parameters:,}", f"{size.bytes:,}", number(seconds, ".2f"))
        table.add_row(Text(name), *cells)
    parts: list[RenderableType] = [table]
    if explain and not result.blocked:
        parts.append(Text("no zero channel had to stay"))
    elif explain:
        stayed = Table("tensor", "axis", "zero channels", "kept by", "because", box=box.SIMPLE)
        for b in result.blocked:
            keeper = f"{b.operator} {b.node}".strip()
            stayed.add_row(*(Text(str(cell)) for cell in (b.value, b.axis, b.channels, keeper, b.reason)))
        parts.append(stayed)
    if (comparison := result.comparison) is not None:
        parts.append(_comparison_text(comparison))
    return Group(*parts)


def render_file_comparison(result: FileComparison) -> Group:
    """What `cpcompile compare` found: sizes, outputs, speed, verdict."""
    sizes = Table(box=box.SIMPLE)
    for column in ("", "original", "candidate", "ratio"):
        sizes.add_column(column, justify="right" if column else "left")
    for what in ("nodes", "parameters", "bytes"):
        before, now = getattr(result.original, what), getattr(result.candidate, what)
        sizes.add_row(what, f"{before:,}", f"{now:,}", number(now / before if before else None, ".3f"))
    parts: list[RenderableType] = [sizes, _outputs_table(result.outputs.outputs)]
    for shape in result.speed.shapes or ():
        if bounded := ratio_with_bounds(shape):
            ratio, low, high = bounded
            parts.append(
                Text(
                    f"p50: original {number(shape.eager_p50_ms, '.3g')} ms, candidate {shape.p50_ms:.3g} ms; "
                    f"{ratio:.2f} ({low:.2f}–{high:.2f}) times as fast, {shape.rounds} rounds"
                )
            )
    parts += [Text(f"drawn: {each}") for each in result.outputs.drawn]
    if result.outputs.runs:
        parts.append(Text(f"tolerance: {result.outputs.tolerance_source}; {result.outputs.runs} inputs"))
    verdict = Text(f"verdict: {result.verdict}", style=VERDICT_STYLE[result.verdict])
    for reason in (result.outputs.reason, result.speed.reason):
        verdict.append(f"\n• {reason}" if reason else "")
    return Group(*parts, verdict)


def _outputs_table(outputs: Sequence[OutputComparison]) -> Table:
    table = Table(box=box.SIMPLE)
    for column in ("output", "max abs difference", "allowed", "relative", "cosine", "SQNR"):
        table.add_column(column, justify="left" if column == "output" else "right")
    for out in outputs:
        ratios = out.ratios
        cells = (number(out.max_abs_error, ".2g"), number(out.tolerance, ".2g"))
        more = (number(ratios.get("max_relative_error"), ".2g"), number(ratios.get("cosine"), ".9f"))
        table.add_row(*map(Text, (out.name, *cells, *more, number(ratios.get("sqnr_db"), ".1f") + " dB")))
    return table


def _comparison_text(comparison: Comparison) -> Text:
    lines = []
    for out in comparison.outputs:
        error, tolerance = number(out.max_abs_error, ".2g"), number(out.tolerance, ".2g")
        lines.append(f"{out.name}: max abs difference {error} of {tolerance}")
    lines += [f"drawn: {each}" for each in comparison.drawn]
    if comparison.runs:
        lines.append(f"tolerance: {comparison.tolerance_source}; {comparison.runs} inputs")
    text = Text("\n".join([*lines, ""]))
    text.append(f"check: {comparison.verdict}", style=VERDICT_STYLE[comparison.verdict])
    return text.append(f": {comparison.reason}" if comparison.reason else "")
