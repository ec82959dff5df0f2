from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import jsonschema
from rich.console import Console

from cpcompile.core.measured import NotMeasured
from cpcompile.report import SCHEMA, controls_table, render_report, summarize_training
from cpcompile.report.results import Diagnosis, LayerError, Memory, Parity, Speed
from cpcompile.report.terminal import footnotes
from tests.unit.report.reports import TRAINING, as_report, complete, report, variant


def text_of(renderable: Any, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_the_terminal_shows_what_the_report_holds() -> None:
    text = text_of(render_report(as_report(complete())))
    for part in (
        "of 4.00 M",
        "25%",
        "of 1.6e-05",
        "dense 20.00",
        "150.0 MB",
        "600.0 MB",
        "1×128: 2.00 (1.90–2.10)",
        "3.00 (2.90–3.10)",
        "800 / s",
        "4.00 (3.80–4.10)",
        "1×1: 0.25 ms",
        "tensorrt [the library] is not installed",
        "loses to small-dense",
        "built in 12.5 s without validation, peak 300.0 MB",
        "verdict: pass",
    ):
        assert part in text, part
    failed = text_of(render_report(as_report(report(variant(), bundle_bytes=200_011))))
    assert "verdict: fail" in failed and "200,011 bytes are more than" in failed


def test_no_sentence_is_lost_on_a_narrow_terminal() -> None:
    words = text_of(render_report(as_report(complete())), width=80).split()
    for finding in complete()["training"]["findings"]:
        assert " ".join(finding.split()) in " ".join(words)


def test_a_footnote_names_the_first_of_many_fields() -> None:
    memory = Memory.without("nobody looked")
    names = list(memory.not_measured)
    found = " ".join(text_of(footnotes(as_report(report(dataclasses.replace(variant(), memory=memory))))).split())
    assert f"{', '.join(names[:4])} and {len(names) - 4} more: nobody looked" in found


def test_a_checkpoint_without_training_results_says_so() -> None:
    assert "records no training results" in text_of(controls_table(None))


def test_the_first_divergence_stands_in_the_reasons_or_its_absence_in_the_footnotes() -> None:
    parity = Parity.without("too far", verdict="fail", reason="too far")
    found = Diagnosis(
        sentence="the first node that differs is MatMul m in layers.0: y differs by 1, allowed are 1e-06",
        node="m",
        operator="MatMul",
        module="layers.0",
        value="y",
        difference="it differs by 1, allowed are 1e-06",
        max_abs_error=1.0,
        tolerance=1e-6,
        layers=(LayerError("layers.0", "y", None, 2.0),),
        repro=NotMeasured("no folder was given"),
    )
    for divergence, reason in ((found, f"too far; {found.sentence}"), (Diagnosis.without("no reference"), "too far")):
        made = report(dataclasses.replace(variant(), parity=parity, divergence=divergence))
        jsonschema.validate(made, json.loads(SCHEMA.read_text(encoding="utf-8")))
        assert made["reasons"][0] == f"de cpu-fp32: parity fail: {reason}"
        assert next(iter(divergence.not_measured.values())) in text_of(render_report(as_report(made)))


def test_the_first_speed_is_against_dense_onnx_runtime_and_the_second_against_eager() -> None:
    text = text_of(render_report(as_report(complete())))
    assert "dense ONNX Runtime" in text and text.index("2.00 (1.90") < text.index("3.00 (2.90")
    header = next(line for line in text.splitlines() if "sequence" in line and "eager" in line)
    assert header.index("onnx-dense") < header.index("eager")
    alone = dataclasses.replace(variant(), peers=(), speed=without_peers(variant().speed))
    text = text_of(render_report(as_report(report(alone))))
    assert "as eager" in text and "1×128: 3.00 (2.90–3.10)" in text and "2 at a time: 4.00 (3.80–4.10)" in text


def without_peers(speed: Speed) -> Speed:
    assert not isinstance(speed.shapes, NotMeasured)
    return dataclasses.replace(speed, shapes=tuple(dataclasses.replace(shape, peers={}) for shape in speed.shapes))


def test_the_table_of_branches_says_what_its_perplexities_are_of() -> None:
    known = {**TRAINING, "settings": {"held_out_tokens": 16384}}
    text = text_of(controls_table(summarize_training(known, ("de", "en"))))
    assert "held-out perplexity of up to 16,384 tokens per context" in " ".join(text.split())
