from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cpcompile.bundle.reader import Bundle
from cpcompile.core.measured import NotMeasured, measurable
from cpcompile.core.types import Feeds
from cpcompile.frontend.checkpoint import Checkpoint
from cpcompile.report.results import Parity
from cpcompile.runtime.engine import load_engine
from cpcompile.validation.language_reference import LanguageReference
from cpcompile.validation.parity import check_parity
from cpcompile.validation.reference import Outputs, Run

LOGITS = {"mean_kl", "top1_agreement", "top5_agreement", "tokens"}
"""The numbers that only logits have."""

POSITIONS = 4 * (1 + 16 + 24)
NO_INPUTS = "nothing to compare on"


def compare(
    engine: Run,
    reference: LanguageReference,
    context: str = "de",
    multiple: float = 8,
    *,
    inputs: Iterable[Feeds] | None = None,
    single: Run | None = None,
    precision: str = "fp32",
    unrounded: Run | None = None,
) -> Parity:
    return check_parity(
        engine,
        single or reference.masked(context),
        reference.exact(context),
        reference.inputs(context) if inputs is None else inputs,
        multiple,
        logits="logits",
        missing=NO_INPUTS,
        precision=precision,
        unrounded=unrounded,
    )


@pytest.fixture
def engine(bundle: Bundle) -> Run:
    return load_engine(bundle, "de", threads=1).outputs


def test_a_right_engine_passes_with_numbers_that_fit_together(engine: Run, reference: LanguageReference) -> None:
    parity = compare(engine, reference)
    assert parity, parity.reason
    assert parity.tokens == POSITIONS
    assert parity.tolerance == 8 * parity.eager_float32_error > 0
    assert 0 < parity.max_abs_error_float64 <= parity.tolerance
    assert parity.max_abs_error <= parity.max_abs_error_float64 + parity.eager_float32_error
    assert abs(parity.mean_kl) < 1e-10
    assert parity.top1_agreement == parity.top5_agreement == 1
    assert 0 < parity.max_relative_error < 1e-5
    assert parity.cosine == pytest.approx(1, abs=1e-12)
    assert 100 < parity.sqnr_db < parity.psnr_db
    assert "float64" in parity.tolerance_source
    assert not parity.not_measured and parity.reason is None


def test_an_engine_in_half_precision_may_round_as_half_precision_does(
    engine: Run, reference: LanguageReference
) -> None:
    """Logits rounded to float16 are what the best engine in float16 can give."""

    def half(feeds: Feeds) -> Outputs:
        return {name: array.astype(np.float16).astype(np.float32) for name, array in engine(feeds).items()}

    def wrong(feeds: Feeds) -> Outputs:
        return {name: array * np.float32(1.5) for name, array in engine(feeds).items()}

    assert compare(half, reference).verdict == "fail"
    parity = compare(half, reference, precision="fp16")
    assert parity and parity.tolerance == 8 * 8192 * parity.eager_float32_error
    assert "8192 (times as coarsely fp16 rounds)" in str(parity.tolerance_source)
    assert compare(wrong, reference, precision="fp16").verdict == "fail"


def test_the_engine_of_another_context_fails(engine: Run, reference: LanguageReference) -> None:
    parity = compare(engine, reference, "en")
    assert parity.verdict == "fail"
    assert "exceeds the tolerance" in parity.reason
    assert parity.mean_kl > 1e-3


def test_one_logit_that_is_off_by_twice_the_tolerance_fails(engine: Run, reference: LanguageReference) -> None:
    tolerance = compare(engine, reference).tolerance

    def perturbed(feeds: Feeds) -> Outputs:
        logits = engine(feeds)["logits"].copy()
        if feeds["input_ids"].shape == (3, 8):
            logits[2, 7, 5] += 2 * tolerance
        return {"logits": logits}

    parity = compare(perturbed, reference)
    assert parity.verdict == "fail"
    assert "exceeds the tolerance" in parity.reason
    assert parity.max_abs_error_float64 == pytest.approx(2 * tolerance, rel=0.5)


def _spoil(logits: npt.NDArray[Any], value: float) -> npt.NDArray[Any]:
    spoiled = logits.copy()
    spoiled[0, 0, 0] = value
    return spoiled


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda logits: {"scores": logits}, r"has the outputs \['scores'\], expected exactly \['logits'\]"),
        (lambda logits: {}, r"has the outputs \[\], expected"),
        (lambda logits: {"logits": logits, "hidden": logits}, r"has the outputs \['hidden', 'logits'\], expected"),
        (lambda logits: {"logits": logits[:, :-1]}, r"shape \(1, 0, 64\), expected \(1, 1, 64\)"),
        (lambda logits: {"logits": logits[0]}, r"shape \(1, 64\), expected \(1, 1, 64\)"),
        (lambda logits: {"logits": logits.astype(np.float16)}, "is float16, expected float32"),
        (
            lambda logits: {"logits": _spoil(logits, np.nan)},
            "1 of 64 values of logits of the engine are NaN or infinite",
        ),
        (
            lambda logits: {"logits": _spoil(logits, -np.inf)},
            "1 of 64 values of logits of the engine are NaN or infinite",
        ),
    ],
)
def test_outputs_that_cannot_be_compared_fail_with_the_reason(
    fault: Callable[[npt.NDArray[Any]], Outputs], reason: str, engine: Run, reference: LanguageReference
) -> None:
    parity = compare(lambda feeds: fault(engine(feeds)["logits"]), reference)
    assert parity.verdict == "fail"
    assert re.search(reason, parity.reason), parity.reason
    assert parity.reason.startswith("input_ids [1, 1]: ")
    assert all(getattr(parity, name) == NotMeasured(parity.reason) for name in measurable(Parity))


def test_an_engine_that_raises_fails(engine: Run, reference: LanguageReference) -> None:
    parity = compare(lambda feeds: engine({"ids": feeds["input_ids"]}), reference)
    assert parity.verdict == "fail"
    assert "the engine raised" in parity.reason


def test_an_eager_model_that_diverged_fails(engine: Run, reference: LanguageReference) -> None:
    def diverged(feeds: Feeds) -> Outputs:
        return {"logits": _spoil(reference.masked("de")(feeds)["logits"], np.inf)}

    parity = compare(engine, reference, single=diverged)
    assert parity.verdict == "fail"
    assert "values of logits of the eager model are NaN or infinite" in parity.reason


def test_the_eager_model_itself_errs_by_once_its_own_error(reference: LanguageReference) -> None:
    eager = reference.masked("de")
    same = compare(eager, reference, multiple=1)
    assert same and same.max_abs_error == 0 and same.max_abs_error_float64 == same.tolerance
    assert not compare(eager, reference, multiple=0.5)


def test_an_exact_model_is_allowed_a_rounding_of_its_largest_value() -> None:
    """Sums of small integers are exact in float32, so there is no noise to measure."""
    x = {"x": np.arange(6, dtype=np.float32)}

    def doubled(feeds: Feeds) -> Outputs:
        return {"y": feeds["x"] * 2}

    def exact(feeds: Feeds) -> Outputs:
        return {"y": feeds["x"].astype(np.float64) * 2}

    def off_by(difference: float) -> Run:
        return lambda feeds: {"y": doubled(feeds)["y"] + np.float32(difference)}

    rounding = float(np.finfo(np.float32).eps) * 10
    for difference, verdict in ((0, "pass"), (rounding, "pass"), (10 * rounding, "fail")):
        parity = check_parity(off_by(difference), doubled, exact, [x], 8, logits=None, missing=NO_INPUTS)
        assert parity.verdict == verdict and parity.eager_float32_error == 0
        assert parity.tolerance == pytest.approx(8 * rounding)
        decibels = set() if difference else {"sqnr_db", "psnr_db"}
        assert set(parity.not_measured) == {*LOGITS, *decibels}


def test_of_several_outputs_the_worst_is_named_and_integers_are_equal() -> None:
    feeds = {"x": np.linspace(0, 1, 7, dtype=np.float32)}

    def outputs(first: float = 0.0, second: float = 0.0, index: int = 0) -> Run:
        def run(feeds: Feeds) -> Outputs:
            x = feeds["x"]
            return {
                "first": np.sin(x) + np.float32(first),
                "second": np.cos(x) + np.float32(second),
                "index": np.array([index], dtype=np.int64),
            }

        return run

    def exact(feeds: Feeds) -> Outputs:
        x = feeds["x"].astype(np.float64)
        return {"first": np.sin(x), "second": np.cos(x), "index": np.array([0], dtype=np.int64)}

    def check(engine: Run) -> Parity:
        return check_parity(engine, outputs(), exact, [feeds], 8, logits=None, missing=NO_INPUTS)

    assert check(outputs())
    assert "in second exceeds" in check(outputs(second=1e-3)).reason
    assert "in first exceeds" in check(outputs(first=1e-3, second=1e-4)).reason
    assert "1 of 1 elements of index differ" in check(outputs(index=1)).reason


def test_a_quantised_engine_may_differ_by_single_steps_and_not_by_more(reference: LanguageReference) -> None:
    """Rounding inputs changes all logits by 0.01; a step changes a few as much, a wrong engine many."""
    eager = reference.masked("de")

    def moved(by: float, part: slice) -> Run:
        def run(feeds: Feeds) -> Outputs:
            logits = eager(feeds)["logits"].copy()
            logits.reshape(-1)[part] += np.float32(by)
            return {"logits": logits}

        return run

    every = slice(None)
    unrounded = moved(0.01, every)
    for by, part, passes in (
        (0.009, slice(None, None, 5), True),
        (0.009, slice(None, None, 3), False),
        (0.009, every, False),
        (0.011, slice(1), False),
    ):
        parity = compare(moved(by, part), reference, unrounded=unrounded)
        assert bool(parity) == passes, (by, part, parity)
        assert not compare(moved(by, part), reference), "without rounding, neither passes"
    assert (
        "what rounding the inputs of products changes"
        in compare(moved(0.009, slice(1)), reference, unrounded=unrounded).tolerance_source
    )
    close = compare(eager, reference, unrounded=unrounded)
    assert close and close.max_abs_error == 0


def test_divergence_and_agreement_are_those_of_torch(reference: LanguageReference) -> None:
    ids = np.resize(np.random.default_rng(1).integers(64, size=64), (8, 8))
    eager = reference.masked("de")

    def shifted(feeds: Feeds) -> Outputs:
        return {"logits": np.roll(eager(feeds)["logits"], 1, axis=-1)}

    parity = compare(shifted, reference, inputs=[{"input_ids": ids}])
    expected = torch.from_numpy(eager({"input_ids": ids})["logits"]).double().log_softmax(-1)
    actual = expected.roll(1, -1)
    kl = torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="sum").item() / 64
    assert parity.mean_kl == pytest.approx(kl, rel=1e-6)
    assert parity.top1_agreement == 0


def test_without_inputs_nothing_is_concluded(engine: Run, reference: LanguageReference) -> None:
    parity = compare(engine, reference, inputs=())
    assert parity == Parity.without(NO_INPUTS, verdict="inconclusive", reason=NO_INPUTS)
    assert not parity


def test_both_precisions_are_the_same_model(checkpoint: Checkpoint, reference: LanguageReference) -> None:
    ids = {"input_ids": np.arange(16, dtype=np.int64)[None]}
    single, double = reference.masked("en")(ids)["logits"], reference.exact("en")(ids)["logits"]
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}
    assert single.dtype == np.float32 and double.dtype == np.float64
    assert 0 < np.abs(single - double).max() < 1e-4


def test_ratios_of_known_signal_and_noise() -> None:
    exact = np.asarray([[3.0, -4.0, 0.0, 1.0]])
    error = np.asarray([[0.3, 0.4, 0.0, -0.1]])

    def giving(values: npt.NDArray[Any]) -> Run:
        return lambda _: {"y": values}

    parity = check_parity(
        giving((exact + error).astype(np.float32)),
        giving(exact.astype(np.float32)),
        giving(exact),
        [{"x": exact}],
        8,
        logits=None,
        missing=NO_INPUTS,
    )
    assert parity.verdict == "fail"
    assert parity.max_relative_error == pytest.approx(0.1)
    assert parity.sqnr_db == pytest.approx(20)  # errors of a tenth: 26 / 0.26
    assert parity.psnr_db == pytest.approx(10 * np.log10(4 * 16 / 0.26))
    dot, norms = float((exact * (exact + error)).sum()), np.linalg.norm(exact) * np.linalg.norm(exact + error)
    assert parity.cosine == pytest.approx(dot / norms)
    assert set(parity.not_measured) == LOGITS


@pytest.mark.parametrize(("value", "reason"), [(0.0, "zero everywhere"), (2.0, "exactly equal")])
def test_ratios_that_do_not_exist_say_why(value: float, reason: str) -> None:
    def constant(feeds: Feeds) -> Outputs:
        return {"y": np.full((2, 3), value, dtype=np.float32)}

    parity = check_parity(constant, constant, constant, [{}], 8, logits=None, missing=NO_INPUTS)
    assert parity, parity.reason
    assert isinstance(parity.sqnr_db, NotMeasured) and reason in parity.not_measured["sqnr_db"]
    assert parity.max_abs_error == 0


def test_a_token_that_slips_to_the_sixth_place_is_no_longer_among_five() -> None:
    own = np.asarray([[[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]], dtype=np.float32)

    def swapped(place: int) -> Outputs:
        values = own.copy()
        values[..., 0], values[..., place] = own[..., place], own[..., 0]
        return {"y": values}

    for place, expected in ((4, 1.0), (5, 0.0)):
        engine, eager = partial(_given, swapped(place)), partial(_given, {"y": own})
        parity = check_parity(engine, eager, eager, [{}], 8, logits="y", missing=NO_INPUTS)
        assert (parity.top1_agreement, parity.top5_agreement) == (0.0, expected)


def _given(outputs: Outputs, feeds: Feeds) -> Outputs:
    return outputs
