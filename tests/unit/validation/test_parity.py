from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cpcompile.bundle import Bundle
from cpcompile.runtime import load_engine
from cpcompile.validation.parity import NUMBERS, EagerReference, Parity, check_parity
from cpcompile.validation.validator import all_outputs

SHAPES = ((1, 1), (1, 16), (3, 8))
POSITIONS = 4 * (1 + 16 + 24)
DE, EN = 0, 1

HeldOut = Mapping[str, npt.NDArray[np.int32]]
Outputs = dict[str, npt.NDArray[Any]]


@pytest.fixture
def engine_run(bundle: Bundle) -> Callable[[npt.NDArray[np.int64]], Mapping[str, npt.NDArray[Any]]]:
    return all_outputs(load_engine(bundle, "de", threads=1))


def test_a_right_engine_passes_with_numbers_that_fit_together(engine_run, reference, held_out: HeldOut) -> None:
    parity = check_parity(engine_run, reference, DE, held_out["de"], SHAPES, 8)
    assert parity, parity.reason
    assert parity.tokens == POSITIONS
    assert parity.tolerance == 8 * parity.eager_float32_error > 0
    assert 0 < parity.max_abs_error_float64 <= parity.tolerance
    assert parity.max_abs_error <= parity.max_abs_error_float64 + parity.eager_float32_error
    assert abs(parity.mean_kl) < 1e-10
    assert parity.top1_agreement == 1
    assert "float64" in parity.tolerance_source
    assert not parity.not_measured and parity.reason is None


def test_the_engine_of_another_context_fails(engine_run, reference, held_out: HeldOut) -> None:
    parity = check_parity(engine_run, reference, EN, held_out["en"], SHAPES, 8)
    assert parity.verdict == "fail"
    assert "exceeds the tolerance" in parity.reason
    assert parity.mean_kl > 1e-3


def test_one_logit_that_is_off_by_twice_the_tolerance_fails(engine_run, reference, held_out: HeldOut) -> None:
    tolerance = check_parity(engine_run, reference, DE, held_out["de"], SHAPES, 8).tolerance

    def perturbed(ids: npt.NDArray[np.int64]) -> Outputs:
        logits = engine_run(ids)["logits"].copy()
        if ids.shape == (3, 8):
            logits[2, 7, 5] += 2 * tolerance
        return {"logits": logits}

    parity = check_parity(perturbed, reference, DE, held_out["de"], SHAPES, 8)
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
        (lambda logits: {"logits": _spoil(logits, np.nan)}, "1 of 64 logits of the engine are NaN or infinite"),
        (lambda logits: {"logits": _spoil(logits, -np.inf)}, "1 of 64 logits of the engine are NaN or infinite"),
    ],
)
def test_outputs_that_cannot_be_compared_fail_with_the_reason(
    fault: Callable[[npt.NDArray[Any]], Outputs], reason: str, engine_run, reference, held_out: HeldOut
) -> None:
    parity = check_parity(lambda ids: fault(engine_run(ids)["logits"]), reference, DE, held_out["de"], SHAPES, 8)
    assert parity.verdict == "fail"
    assert re.search(reason, parity.reason), parity.reason
    assert parity.reason.startswith("batch 1, sequence 1: ")
    assert all(getattr(parity, name) is None and parity.not_measured[name] == parity.reason for name in NUMBERS)


def test_an_engine_that_raises_fails(bundle: Bundle, reference, held_out: HeldOut) -> None:
    session = load_engine(bundle, "de", threads=1).session

    def misnamed(ids: npt.NDArray[np.int64]) -> Outputs:
        return {"logits": session.run(["logits"], {"ids": ids})[0]}

    parity = check_parity(misnamed, reference, DE, held_out["de"], SHAPES, 8)
    assert parity.verdict == "fail"
    assert "the engine raised" in parity.reason


def test_an_eager_model_that_diverged_fails(engine_run, checkpoint, held_out: HeldOut) -> None:
    model = copy.deepcopy(checkpoint.model)
    with torch.no_grad():
        model.norm.weight[0] = torch.inf
    parity = check_parity(engine_run, EagerReference.of(model), DE, held_out["de"], SHAPES, 8)
    assert parity.verdict == "fail"
    assert "logits of the eager model are NaN or infinite" in parity.reason


def test_the_eager_model_itself_errs_by_once_its_own_error(reference, held_out: HeldOut) -> None:
    def eager(ids: npt.NDArray[np.int64]) -> Outputs:
        return {"logits": reference.logits(ids, DE)[0]}

    same = check_parity(eager, reference, DE, held_out["de"], SHAPES, 1)
    assert same and same.max_abs_error == 0 and same.max_abs_error_float64 == same.tolerance
    assert not check_parity(eager, reference, DE, held_out["de"], SHAPES, 0.5)


def test_divergence_and_agreement_are_those_of_torch(reference, held_out: HeldOut) -> None:
    def shifted(ids: npt.NDArray[np.int64]) -> Outputs:
        return {"logits": np.roll(reference.logits(ids, DE)[0], 1, axis=-1)}

    parity = check_parity(shifted, reference, DE, held_out["de"], ((2, 8),), 8)
    ids = np.resize(held_out["de"], (8, 8)).astype(np.int64)
    expected = torch.from_numpy(reference.logits(ids, DE)[0]).double().log_softmax(-1)
    actual = expected.roll(1, -1)
    kl = torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="sum").item() / 64
    assert parity.mean_kl == pytest.approx(kl, rel=1e-6)
    assert parity.top1_agreement == 0


def test_without_text_nothing_is_concluded(engine_run, reference) -> None:
    parity = check_parity(engine_run, reference, DE, np.zeros(0, dtype=np.int32), SHAPES, 8)
    assert parity == Parity.without_numbers("inconclusive", "there is no held-out text of this context")
    assert not parity


def test_the_reference_is_the_same_model_twice(checkpoint) -> None:
    model = checkpoint.model
    reference = EagerReference.of(model)
    assert reference.single is model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in reference.double.parameters()} == {torch.float64}
    assert torch.equal(reference.double.frequencies, model.frequencies.double())
    single, double = reference.logits(np.arange(16, dtype=np.int64)[None], EN)
    assert single.dtype == np.float32 and double.dtype == np.float64
    assert 0 < np.abs(single - double).max() < 1e-4
