from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from cpcompile.report import compare_reports, render_difference, render_difference_page
from cpcompile.report.difference import WHOLE, Change, Difference
from tests.unit.report.reports import as_report, complete, report, skipped, variant
from tests.unit.report.test_terminal import text_of

VARIANT = ("contexts", 0, "variants", 0)
SHAPE = (*VARIANT, "speed", "shapes", 0)


def changed(*edits: tuple[tuple[Any, ...], dict[str, object]]) -> Difference:
    """`complete` against itself with those edits."""
    after = complete()
    for path, values in edits:
        node: Any = after
        for step in path:
            node = node[step]
        node.update(values)
    return compare_reports(as_report(complete()), as_report(after), ("before.json", "after.json"))


def changes(difference: Difference) -> dict[str, Change]:
    return {f"{part.name}: {change.name}": change for part in difference.parts for change in part.changes}


def test_equal_reports_differ_in_nothing() -> None:
    same = changed()
    assert changes(same) == {} and same.appeared == same.disappeared == () and same.beyond_noise == 0
    assert [part.name for part in same.parts] == [WHOLE, "de", "de cpu-fp32", "de tensorrt-fp16", "en", "en cpu-fp32"]
    assert next(part for part in same.parts if part.name == "de cpu-fp32").equal > 30
    text = text_of(render_difference(same))
    assert "No number exceeds the measured noise." in text and "verdict: pass\n" in text


@pytest.mark.parametrize(
    ("path", "values", "name", "beyond"),
    [
        # The intervals are 2.9 to 3.1 before.
        (SHAPE, {"ratio": 3.15, "ratio_low": 3.05, "ratio_high": 3.2}, "speed 1x128 ratio", False),
        (SHAPE, {"ratio": 3.3, "ratio_low": 3.2, "ratio_high": 3.4}, "speed 1x128 ratio", True),
        (SHAPE, {"ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.8}, "speed 1x128 ratio", True),
        (SHAPE, {"p50_ms": 9.0}, "speed 1x128 p50 ms", None),
        # The tolerance is 1.6e-5.
        ((*VARIANT, "parity"), {"max_abs_error": 1.8e-5}, "parity max abs error", False),
        ((*VARIANT, "parity"), {"max_abs_error": 2e-5}, "parity max abs error", True),
        ((*VARIANT, "quality"), {"perplexity": 19.03}, "quality perplexity", False),
        ((*VARIANT, "quality"), {"perplexity": 19.05}, "quality perplexity", True),
        ((*VARIANT, "quality"), {"accuracy": 0.1}, "quality accuracy", None),
        # The standard error is 0.104 on both sides.
        ((*VARIANT, "quality"), {"coherence": 0.7}, "quality coherence", False),
        ((*VARIANT, "quality"), {"dense_coherence": 0.1}, "quality dense coherence", True),
        ((*VARIANT, "memory"), {"run_peak_rss_bytes": 9}, "memory run peak rss bytes", None),
        (VARIANT, {"bytes": 1_000_001}, "bytes", True),
        ((*VARIANT, "placement", "operators"), {"MatMul": 2}, "placement operators MatMul", True),
    ],
)
def test_a_change_is_compared_with_the_noise_of_its_kind(
    path: tuple[Any, ...], values: dict[str, object], name: str, beyond: bool | None
) -> None:
    difference = changed((path, values))
    change = changes(difference)[f"de cpu-fp32: {name}"]
    assert change.beyond_noise is beyond
    assert change.relative == pytest.approx(change.after / change.before - 1, rel=1e-12)
    marked = [c for c in changes(difference).values() if c.beyond_noise]
    assert difference.beyond_noise == len(marked) and bool(marked) == (beyond is True)


def test_numbers_of_the_whole_and_of_a_context() -> None:
    found = changes(
        changed(
            (("bundle",), {"bytes": 10}),
            (("build",), {"seconds": 25.0}),
            (("contexts", 1, "parameters"), {"kept": 999_999}),
            (("training", "controls", "partition"), {"mean_perplexity": 30.0}),
        )
    )
    assert found[f"{WHOLE}: bundle bytes"].beyond_noise is True
    assert found[f"{WHOLE}: build seconds"].relative == 1.0
    assert found[f"{WHOLE}: training partition mean perplexity"].beyond_noise is True
    assert found["en: parameters kept"].before == 1_000_000


def test_what_appeared_and_what_disappeared() -> None:
    more = report(variant(), skipped(), variant("en", perplexity=29.0, dense="no baseline"))
    less = report(variant("en", perplexity=29.0, dense=30.0))
    forth, back = (compare_reports(*map(as_report, pair), ("a", "b")) for pair in ((less, more), (more, less)))
    assert forth.appeared == back.disappeared and forth.disappeared == back.appeared
    assert forth.appeared == ("de", "de cpu-fp32", "de tensorrt-fp16")
    assert "en cpu-fp32: quality dense perplexity" in forth.disappeared


def test_the_terminal_the_page_and_json_say_the_same() -> None:
    difference = changed(
        (SHAPE, {"ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1}), ((), {"verdict": "fail", "reasons": ["slow"]})
    )
    text, page = text_of(render_difference(difference)), render_difference_page(difference)
    assert "speed 1x128 ratio" in text and "−33.3 %" in text and "beyond" in text
    assert "• after: slow" in text and "verdict: pass → fail" in text
    for part in ("Pass → fail", "speed 1x128 ratio", "−33.3 %", "after: slow", "3 numbers exceed the measured noise"):
        assert part in page, part
    assert json.loads(json.dumps(dataclasses.asdict(difference)))["verdicts"] == ["pass", "fail"]
