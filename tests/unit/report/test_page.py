from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import jsonschema
import numpy as np
import pytest

from cpcompile.core.json_form import to_json
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.report import (
    SCHEMA,
    render_difference,
    render_difference_page,
    render_page,
    render_report,
    summarize_training,
)
from cpcompile.report.contents import LayerSelection
from cpcompile.report.difference import compare_reports
from cpcompile.report.page import selection_map
from cpcompile.report.results import Diagnosis
from tests.unit.report.reports import SELECTION, TRAINING, as_report, complete, report, skipped, variant
from tests.unit.report.test_terminal import text_of

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>$x^{"
SECTIONS = ("verdict", "engines", "selection", "overlap", "swap", "controls", "build", "environment", "gaps")
ERRORS = [
    {"module": f"layers.{i}", "value": "v", "max_abs_error": e, "largest": 2.0} for i, e in enumerate((1e-7, 4e-7, 0.0))
]


class Elements(HTMLParser):
    """All elements with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.text += " " * (tag in ("td", "dd", "dt"))

    def all(self, attribute: str) -> list[str]:
        return [value for _, own in self.tags if (value := own.get(attribute)) is not None]


def diverged(sentence: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What a report holds of an engine that left the path."""
    plain: dict[str, Any] = to_json(Diagnosis.without("no reference"))
    return {**plain, "sentence": sentence, "layers": layers, "not_measured": {}}


def hostile() -> dict[str, Any]:
    """A report in which everything that can be a name or a reason is an attack."""
    whole = complete()
    whole["contexts"][0]["variants"][0]["divergence"] = diverged(HOSTILE, [{**ERRORS[0], "module": HOSTILE}, *ERRORS])
    whole["model"]["name"], whole["reasons"] = HOSTILE, [HOSTILE]
    text = json.dumps(whole)
    for name in ("de", "layer 0", "capture", "cpu-fp32", "one-mask", "MatMul", "CPUExecutionProvider", "width"):
        assert json.dumps(name) in text
        text = text.replace(json.dumps(name), json.dumps(HOSTILE))
    found: dict[str, Any] = json.loads(text.replace("tensorrt [the library]", json.dumps(HOSTILE)[1:-1]))
    return found


def layers_of(digits: list[dict[str, Any]]) -> list[LayerSelection]:
    return [LayerSelection(**layer) for layer in digits]


def difference() -> str:
    return render_difference_page(compare_reports(as_report(complete()), as_report(hostile()), ("a", HOSTILE)))


def test_the_page_has_every_section_and_what_is_in_the_report() -> None:
    page = Elements(render_page(as_report(complete())))
    assert set(SECTIONS) <= set(page.all("id"))
    words = " ".join(page.text.split())
    for part in (
        "Every engine that ran computes what its eager model computes",
        "mean perplexity of cpu-fp32; dense 24.49 (−4.2 %)",
        "as fast as the dense model in ONNX Runtime at 1×128; 3.00 × as fast as eager",
        "coherence 0.450± 0.104 0.450± 0.104 +0.000 ± 0.208",
        "1.00 M 25 % of 4.00 M",
        "removed FFN blocks: 3.00 M (75 %)",
        "3.00 (2.90–3.10)",
        "eager 600.0 MB",
        "Tolerance: 8 x the eager model's own float32 error 2e-06.",
        "skipped: tensorrt [the library] is not installed",
        "The partitioned model loses to small-dense",
        "Not measured: it was not asked for",
        "engine, private 100.0 MB",
        "requests per second, 2 at a time 800 eager 200 times as many 4.00 (3.80–4.10)",
        "CPUExecutionProvider 1",
        "text of de 19.00 40.00",
    ):
        assert part in words, part


@pytest.mark.parametrize(
    ("controls", "says"),
    [
        ({}, "dense 24.49 (−4.2 %), which is not distilled as the engine's model is"),
        ({"dense-distilled": 20.0}, "against the dense model distilled alike +17.4 % in training"),
    ],
)
def test_the_quality_of_a_distilled_model_is_put_into_proportion(controls: dict[str, float], says: str) -> None:
    training = {
        **TRAINING,
        "settings": {"distill": 0.5, "steps": 9},
        "controls": {
            name: {"description": name, "perplexity": dict.fromkeys(("de", "en"), value)}
            for name, value in controls.items()
        },
    }
    whole = {**complete(), "training": to_json(summarize_training(training, ("de", "en")))}
    text = " ".join(Elements(render_page(as_report(whole))).text.split())
    assert says in text and "was also distilled from the baseline" in text


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        ("fail", "A check failed"),
        ("inconclusive", "a required check could not be decided"),
    ],
)
def test_a_verdict_that_is_no_pass_comes_with_its_reasons(verdict: str, word: str) -> None:
    text = Elements(
        render_page(as_report({**complete(), "verdict": verdict, "reasons": ["one", "another reason"]}))
    ).text
    assert word in text and text.index("another reason") < text.index("Engines")


@pytest.mark.parametrize(
    "page_of", [lambda: render_page(as_report(complete())), lambda: render_page(as_report(hostile())), difference]
)
def test_the_page_is_one_file_without_scripts(page_of: Callable[[], str]) -> None:
    page = page_of()
    found = Elements(page)
    assert not {"script", "img", "iframe", "object", "embed"} & {tag for tag, _ in found.tags}
    assert not [name for _, own in found.tags for name in own if name.startswith("on") or name == "src"]
    assert all(link.startswith("#") or link == "data:," for link in found.all("href"))
    assert "@import" not in page and not re.search(r"url\((?!#)", page) and "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page


def test_names_and_reasons_are_text() -> None:
    whole = hostile()
    assert Elements(render_page(as_report(whole))).text.count(HOSTILE) > 20
    assert HOSTILE in Elements(difference()).text


def test_ids_are_unique_and_every_link_leads_somewhere() -> None:
    page = render_page(as_report(complete()))
    found = Elements(page)
    ids = found.all("id")
    assert len(ids) == len(set(ids))
    links = [link for link in found.all("href") if link.startswith("#")] + re.findall(r"url\((#[^)]*)\)", page)
    assert len(links) > 10 and {link[1:] for link in links} <= set(ids)


def test_charts_are_named_painted_by_the_page_and_hold_text() -> None:
    page = render_page(as_report({**complete(), "contexts": complete()["contexts"][:1]}))
    charts = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    drawn = [chart for chart in charts if "aria-labelledby" in chart]
    assert len(drawn) == 3  # latency, speed, stages: of the only stage no memory is known
    for chart in drawn:
        assert 'role="img"' in chart and "<title" in chart and "<text" in chart
        assert "var(--ink)" in chart and "#0101" not in chart and "DejaVu" not in chart


def test_errors_of_layers_are_drawn_where_they_were_measured() -> None:
    whole = complete()
    first, _, other = (v for context in whole["contexts"] for v in context["variants"])
    first["divergence"] = diverged(
        "node up differs first", [*ERRORS, {**ERRORS[0], "module": "", "max_abs_error": None}]
    )
    other["divergence"] = diverged("", [])
    other["divergence"] |= {"sentence": None, "layers": None, "not_measured": {"layers": "no reference"}}
    text = " ".join(Elements(render_page(as_report(whole))).text.split())
    assert "First divergence: node up differs first" in text
    assert "Relative error per layer; the largest is inf at the whole model" in text
    assert "the whole model not finite 2 layers.1 4e-07 2 layers.0 1e-07 2" in text
    assert "Not measured: no reference" in text
    assert "no reference divergence layers · en cpu-fp32" in text


def test_every_reason_is_there_once_with_what_it_concerns() -> None:
    text = " ".join(Elements(render_page(as_report(complete()))).text.split())
    gaps = text[text.rindex("What was not measured, and why") :]
    assert gaps.count("there is no dense baseline") == 1
    assert "speed ratio, speed ratio low, speed ratio high · de cpu-fp32, en cpu-fp32" in gaps
    assert "the whole engine (skipped) · de tensorrt-fp16" in gaps
    assert "openvino is not installed peer openvino · de cpu-fp32, en cpu-fp32" in gaps


@pytest.mark.parametrize(
    "change",
    [
        {"training": None},
        {"contexts": []},
        {"selection": {"kinds": None, "not_measured": {"kinds": "an old program"}}},
        {"contexts": report(skipped())["contexts"]},
        {"contexts": report(variant(dense="no baseline"))["contexts"]},
        {"build": dict.fromkeys(complete()["build"]) | {"stages": [], "not_measured": {"seconds": "lost"}}},
    ],
)
def test_a_report_with_gaps_is_a_page_as_well(change: dict[str, Any]) -> None:
    assert set(SECTIONS) <= set(Elements(render_page(as_report({**complete(), **change}))).all("id"))


def test_units_that_the_same_contexts_keep_are_one_run() -> None:
    found = selection_map("ffn", layers_of(SELECTION["ffn"]))
    assert found.rows[0].runs == (
        (0, 1, "all", "de, en"),
        (1, 1, "own0", "de"),
        (2, 1, "own1", "en"),
        (3, 1, "none", "no context"),
    )
    assert found.rows[1].runs == ((0, 1, "all", "de, en"), (1, 3, "own0", "de"))
    assert [text for _, text in found.legend] == ["all contexts", "only de", "only en", "no context"]


def test_many_contexts_are_told_apart_by_how_many_keep_a_unit() -> None:
    kept = {f"c{i}": "1" if i < 4 else "0" for i in range(10)}
    assert selection_map("ffn", layers_of([{"name": "layer 0", "kept": kept}])).rows[0].runs[0][:3] == (0, 1, "share4")


def test_the_overlap_is_that_of_the_selection() -> None:
    table = np.random.default_rng(0).random((3, 4, 9)) < 0.4
    selection = Selection(("a", "b", "c"), {UnitKind.FFN: table})
    digits = selection.digits({UnitKind.FFN: [(f"layer {i}", 9) for i in range(4)]})
    jaccard = [[(one & other).sum() / (one | other).sum() for other in table] for one in table]
    assert np.allclose(selection_map("ffn", layers_of(digits["ffn"])).overlap, jaccard, rtol=1e-12)


VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def leaves(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in `node` that holds nothing itself."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(value, dict | list):
            yield from leaves(value)
        else:
            yield node, key


@pytest.mark.parametrize(
    "extreme",
    [
        None,
        pytest.param(1e300, marks=pytest.mark.slow),
        pytest.param(0, marks=pytest.mark.slow),
        pytest.param(1, marks=pytest.mark.slow),
    ],
)
def test_whatever_follows_the_schema_is_a_page(extreme: float | None) -> None:
    """Every leaf that may take the extreme value takes it, and no reason is given for anything."""
    whole = complete()
    for context in whole["contexts"]:
        for engine in context["variants"]:
            for part in ("parity", "quality", "memory", "speed", "placement"):
                engine[part]["not_measured"] = {}
    changed = 0
    for container, key in leaves(whole):
        before, container[key] = container[key], extreme
        if VALIDATOR.is_valid(whole):
            changed += 1
        else:
            container[key] = before
    assert changed > 10
    made = as_report(whole)
    assert set(SECTIONS) <= set(Elements(render_page(made)).all("id"))
    difference = compare_reports(as_report(complete()), made, ("a", "b"))
    assert text_of(render_report(made)) and text_of(render_difference(difference))
