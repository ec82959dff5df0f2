"""The report in a terminal: an engine per row, the trained branches, what was not measured and why, the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpcompile.core.config import DENSE_PEER
from cpcompile.core.measured import NotMeasured
from cpcompile.report.contents import ParameterCounts, PrecisionSearch, Report
from cpcompile.report.difference import Difference
from cpcompile.report.formats import NOTHING, arrow, count, gaps, increase, megabytes, number, plain, shape_name, signed
from cpcompile.report.results import Memory, PeerSpeed, ShapeSpeed, Throughput, VariantResult, ratio_with_bounds
from cpcompile.report.training_summary import PARTITION, TrainingSummary

VERDICT_STYLE = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow"}
NAMED = 4
"""Names that a footnote lists."""


def render_report(report: Report) -> RenderableType:
    """The whole report for a terminal."""
    parts: list[RenderableType] = [contexts_table(report)]
    if report.build.search is not None:
        parts.append(search_table(report.build.search))
    if any(variant.peers for context in report.contexts for variant in context.variants):
        parts.append(peers_table(report))
    if report.training is not None:
        parts.append(controls_table(report.training))
    return Group(*parts, footnotes(report), verdict_text(report))


def contexts_table(report: Report) -> Table:
    """A row per engine: its parameters and size, its correctness and cost, and its speed.

    The speed is compared with the dense model in ONNX Runtime where that was timed, otherwise with the eager model.
    """
    title = Text(f"{report.model.name}: engines")
    against_peer = _is_timed(report, DENSE_PEER)
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0), pad_edge=False)
    for column in (
        "context",
        "parameters",
        "size",
        "parity\nerror",
        "perplexity",
        "run\nmemory",
        "times as fast as\ndense ONNX Runtime" if against_peer else "times as fast\nas eager",
    ):
        first = column == "context"
        table.add_column(column, justify="left" if first else "right", overflow="fold" if first else "ellipsis")
    for context in report.contexts:
        for variant in context.variants:
            cells = [
                f"{context.name}\n{variant.name}",
                _parameters_cell(context.parameters),
                megabytes(variant.bytes),
                *(
                    [*_measured_cells(variant), _speed_cell(variant, against_peer=against_peer)]
                    if variant.status == "ran"
                    else [variant.status, "–", "–", "–"]
                ),
            ]
            table.add_row(*(Text(cell) for cell in cells))
    return table


def peers_table(report: Report) -> Table:
    """A row per engine and shape: its latency, and how many times as fast it is as each peer and as eager."""
    variants = [(context, v) for context in report.contexts for v in context.variants if v.peers]
    several = len({variant.name for _, variant in variants}) > 1

    def named(context: str, variant: str) -> str:
        return f"{context} {variant}" if several else context

    names = list(dict.fromkeys(peer.name for _, variant in variants for peer in variant.peers))
    names.sort(key=lambda name: name != DENSE_PEER)
    title = "p50 of the engine, and how many times as fast it is as other ways to run the model"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("context", "batch x\nsequence", "engine", *names[:1], "eager", *names[1:]):
        table.add_column(Text(column), justify="left" if column == "context" else "right")
    for context, variant in variants:
        for shape in variant.speed.shapes or ():
            ratios = [number(shape.peers[name].ratio if name in shape.peers else None, ".2f") for name in names]
            cells = [named(context.name, variant.name), shape_name(shape), f"{shape.p50_ms:.3g} ms"]
            cells += [*ratios[:1], _bounded(shape) or NOTHING, *ratios[1:]]
            table.add_row(*(Text(cell) for cell in cells))
        if throughput := _bounded(variant.throughput):
            rate = f"{number(variant.throughput.requests_per_second, '.3g')} / s"
            cells = [named(context.name, variant.name), f"{variant.throughput.workers} at a time", rate]
            cells += [*[NOTHING] * len(names[:1]), throughput, *[NOTHING] * len(names[1:])]
            table.add_row(*(Text(cell) for cell in cells))
    return table


def search_table(search: PrecisionSearch) -> RenderableType:
    """A row per candidate of `--target best`: what it costs in quality, how large and how fast it is."""
    title = f"precisions that were tried, timed in {search.context}; the budget is {search.budget:.1%}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    shapes = list(search.candidates[0].p50_ms)
    columns = ("precision", "bits a\nweight", "size", "perplexity", *(f"{shape}\nms" for shape in shapes))
    for column in (*columns, "times as fast\nas fp32"):
        table.add_column(Text(column), justify="left" if column == "precision" else "right")
    for each in search.candidates:
        cost = increase(each.increase, each.increase_error)
        chosen = each.name == search.chosen
        mark = "" if each.within_budget else " (over)"
        cells = [f"{each.name}{' *' if chosen else mark}", f"{each.bits_per_weight:.1f}", megabytes(each.bytes), cost]
        cells += [*(number(each.p50_ms[shape], ".3g") for shape in shapes), f"{1 / each.relative_time:.2f}x"]
        style = "bold green" if chosen else "dim" if mark else None
        table.add_row(*(Text(cell) for cell in cells), style=style)
    other = increase(search.other_increase, search.other_increase_error)
    return Group(
        table,
        Text("times as fast: the geometric mean over the shapes; ±: three standard errors"),
        Text(f"* chosen: {search.chosen}, {search.reason}"),
        Text(f"• on the half of the text that took no part in the choice: {other}\n"),
    )


def controls_table(training: TrainingSummary | None) -> RenderableType:
    """The trained branches from best to worst mean perplexity, and the findings below."""
    if training is None:
        return Text("this checkpoint records no training results", style="dim")
    controls = training.controls
    tokens = training.held_out_tokens
    table = Table(title="held-out perplexity" + (f" of up to {tokens:,} tokens per context" if tokens else ""))
    table.add_column("branch")
    table.add_column("mean", justify="right")
    for context in next(iter(controls.values())).perplexity:
        table.add_column(Text(context), justify="right")
    for name, branch in sorted(controls.items(), key=lambda item: item[1].mean_perplexity):
        values = (branch.mean_perplexity, *branch.perplexity.values())
        table.add_row(
            Text(name), *(Text(f"{value:.2f}") for value in values), style="bold" if name == PARTITION else None
        )
    return Group(table, *(Text(f"• {finding}") for finding in training.findings))


def render_difference(difference: Difference) -> Group:
    """Two reports side by side: the numbers that differ, and which of them exceed the noise."""
    parts: list[RenderableType] = []
    for part in difference.parts:
        title = Text(part.name + (f": parity {arrow(part.verdicts)}" if part.verdicts else ""))
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("number", "before", "after", "change", "noise"):
            table.add_column(column, justify="left" if column == "number" else "right")
        for change in part.changes:
            noise = {True: "beyond", False: "within", None: "unknown"}[change.beyond_noise]
            cells = (change.name, plain(change.before), plain(change.after), signed(change.relative), noise)
            table.add_row(*map(Text, cells), style="bold" if change.beyond_noise else None)
        parts += [table] if part.changes else [title]
        parts.append(Text(f"{part.equal} numbers are equal\n", style="dim"))
    lines = [f"+ {name}" for name in difference.appeared] + [f"- {name}" for name in difference.disappeared]
    for when, reasons in zip(("before", "after"), difference.reasons, strict=True):
        lines += [f"• {when}: {reason}" for reason in reasons]
    text = Text("\n".join([*lines, difference.summary, ""]))
    text.append(f"verdict: {arrow(difference.verdicts)}", style=VERDICT_STYLE[difference.verdicts[1]])
    return Group(*parts, text)


def footnotes(report: Report) -> Text:
    """Why there are gaps in the table: each reason once, with the engines or the fields that it concerns."""
    concerned: dict[str, list[str]] = {}
    for context in report.contexts:
        for variant in context.variants:
            if variant.status == "ran":
                found = list(gaps(variant))
                found += [(peer.name, peer.reason) for peer in variant.peers if peer.reason]
            else:
                found = [(f"{context.name} {variant.name}", str(variant.reason))]
            for what, reason in found:
                whats = concerned.setdefault(reason, [])
                if what not in whats:
                    whats.append(what)
    lines = (f"– {_first(whats)}: {reason}" for reason, whats in concerned.items())
    return Text("\n".join(lines), style="dim")


def _first(names: Sequence[str]) -> str:
    """The first of many names; report.json has them all."""
    more = len(names) - NAMED
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:NAMED])} and {more} more"


def verdict_text(report: Report) -> Text:
    """Build, bundle and verdict in a few lines."""
    build, bundle = report.build, report.bundle
    text = Text()
    if not isinstance(build.seconds, NotMeasured):
        text.append(f"built in {build.seconds:.1f} s without validation, peak {megabytes(build.peak_rss_bytes)}")
        text.append(f" ({megabytes(build.peak_private_bytes)} of it private); ")
    text.append(f"bundle {megabytes(bundle.bytes)}, dense model {megabytes(bundle.dense_bytes)}\n")
    text.append(f"verdict: {report.verdict}", style=VERDICT_STYLE[report.verdict])
    variants = [variant for context in report.contexts for variant in context.variants]
    if kept := sum(variant.kept for variant in variants):
        text.append(f" (the results of {kept} of {len(variants)} engines, which have not changed, are kept)")
    if built := sum(variant.status == "built" for variant in variants):
        text.append(f" (of the engines that ran; {built} of {len(variants)} were built and not run)")
    for reason in report.reasons:
        text.append(f"\n• {reason}")
    return text


def _measured_cells(variant: VariantResult) -> list[str]:
    """Parity, perplexity and memory of an engine that ran."""
    parity, quality, memory = variant.parity, variant.quality, variant.memory
    error, tolerance = number(parity.max_abs_error_float64, ".2g"), number(parity.tolerance, ".2g")
    return [
        f"{error}\nof {tolerance}\n{parity.verdict}",
        f"{number(quality.perplexity, '.2f')}\ndense {number(quality.dense_perplexity, '.2f')}",
        f"{_memory_lines(memory, '')}\neager {_memory_lines(memory, 'eager_')}",
    ]


def _memory_lines(memory: Memory, side: str) -> str:
    resident, private = (megabytes(getattr(memory, f"{side}run_peak_{what}_bytes")) for what in ("rss", "private"))
    return f"{resident}\nprivate {private}"


def _is_timed(report: Report, peer: str) -> bool:
    variants = (variant for context in report.contexts for variant in context.variants)
    return any(peer in shape.peers for variant in variants for shape in variant.speed.shapes or ())


def _speed_cell(variant: VariantResult, *, against_peer: bool) -> str:
    """A line per shape, with the latency where there is no ratio."""
    lines = []
    for shape in variant.speed.shapes or ():
        ratio = _interval(shape.peers.get(DENSE_PEER)) if against_peer else _bounded(shape)
        lines.append(f"{shape_name(shape)}: {ratio or f'{shape.p50_ms:.2f} ms'}")
    if not against_peer and lines and (ratio := _bounded(variant.throughput)):
        lines.append(f"{variant.throughput.workers} at a time: {ratio}")
    return "\n".join(lines) or NOTHING


def _interval(peer: PeerSpeed | None) -> str:
    return f"{peer.ratio:.2f} ({peer.ratio_low:.2f}–{peer.ratio_high:.2f})" if peer is not None else ""


def _bounded(timed: ShapeSpeed | Throughput) -> str:
    """The ratio of engine and eager model with its interval; empty where it is unknown."""
    if not (bounded := ratio_with_bounds(timed)):
        return ""
    ratio, low, high = bounded
    return f"{ratio:.2f} ({low:.2f}–{high:.2f})"


def _parameters_cell(parameters: ParameterCounts) -> str:
    kept, total = parameters.kept, parameters.total
    return f"{count(kept)}\nof {count(total)}\n{kept / total:.0%}"
