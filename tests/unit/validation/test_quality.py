from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cpcompile.core.measured import NotMeasured
from cpcompile.frontend.checkpoint import Checkpoint
from cpcompile.validation.language_reference import eager_run
from cpcompile.validation.quality import NOT_ASKED, Score, compare_quality, consecutive_windows, measure_score


def quarter(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Probability 1/4 for token 0 and 3/4 for token 1, whatever comes in; the logits carry an offset of 1000."""
    logits = 1000 + np.log(np.array([0.25, 0.75]))
    return np.broadcast_to(logits, (*ids.shape, 2)).astype(np.float64)


def test_score_by_hand() -> None:
    score = measure_score(quarter, np.array([[0, 1, 1, 0]]))
    assert score.tokens == 3
    assert score.accuracy == pytest.approx(2 / 3, rel=1e-12)
    assert score.perplexity == pytest.approx((4 / 3 * 4 / 3 * 4) ** (1 / 3), rel=1e-12)


def test_score_sums_over_batches_of_any_size() -> None:
    windows = np.random.default_rng(0).integers(2, size=(7, 6))
    whole = measure_score(quarter, windows, batch=7)
    for batch in (1, 2, 4):
        part = measure_score(quarter, windows, batch=batch)
        assert part.perplexity == pytest.approx(whole.perplexity, rel=1e-12)
        assert (part.accuracy, part.tokens) == (whole.accuracy, 35)


def test_score_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = np.random.default_rng(0).integers(2, size=(7, 6))
    whole = measure_score(quarter, windows)
    for piece in (1, 4, 7):
        monkeypatch.setattr("cpcompile.validation.quality.PIECE", piece)
        part = measure_score(quarter, windows)
        assert part.perplexity == pytest.approx(whole.perplexity, rel=1e-12)
        assert (part.accuracy, part.tokens) == (whole.accuracy, whole.tokens)


def test_score_of_the_eager_model_is_the_cross_entropy_of_torch(dense: Checkpoint) -> None:
    model = dense.model
    windows = consecutive_windows(dense.held_out["de"], 16)
    run = eager_run(model)
    score = measure_score(lambda ids: run({"input_ids": ids})["logits"], windows)
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).double().flatten(0, 1), ids[:, 1:].flatten())
    assert score.perplexity == pytest.approx(math.exp(loss.item()), rel=1e-6)


@pytest.mark.parametrize(("tokens", "sequence", "count"), [(33, 16, 2), (32, 16, 1), (17, 16, 1), (300, 7, 42)])
def test_windows_predict_every_token_once(tokens: int, sequence: int, count: int) -> None:
    windows = consecutive_windows(np.arange(tokens, dtype=np.int32), sequence)
    assert windows.shape == (count, sequence + 1) and windows.dtype == np.int64
    assert windows[:, 1:].flatten().tolist() == list(range(1, count * sequence + 1))
    assert windows[:, :-1].flatten().tolist() == list(range(count * sequence))


def test_leading_tokens_start_every_window_and_are_not_scored() -> None:
    windows = consecutive_windows(np.arange(1, 10), 6, leading=(100, 101))
    assert windows.tolist() == [[100, 101, 1, 2, 3, 4, 5], [100, 101, 5, 6, 7, 8, 9]]
    assert consecutive_windows(np.arange(9), 2, leading=(100, 101)).shape == (0, 3)  # no room for text
    text = np.array([[1, 1, 0, 1, 1, 0]])
    assert measure_score(quarter, text, leading=2) == measure_score(quarter, text[:, 2:])


def test_windows_of_short_texts() -> None:
    assert consecutive_windows(np.array([4, 5, 6]), 16).tolist() == [[4, 5, 6]]
    assert consecutive_windows(np.array([4]), 16).shape == (0, 17)
    assert consecutive_windows(np.zeros(0, dtype=np.int32), 16).shape == (0, 17)


def test_a_missing_side_is_null_with_its_reason() -> None:
    quality = compare_quality(Score(perplexity=3.0, accuracy=0.5, tokens=10), NotMeasured("no baseline"))
    assert (quality.perplexity, quality.accuracy, quality.tokens) == (3.0, 0.5, 10)
    assert not quality.dense_perplexity and not quality.dense_accuracy
    assert quality.not_measured == {
        "coherence": NOT_ASKED.reason,
        "coherence_error": NOT_ASKED.reason,
        "coherence_difference_error": NOT_ASKED.reason,
        "dense_coherence": "no baseline",
        "dense_coherence_error": "no baseline",
        "dense_perplexity": "no baseline",
        "dense_accuracy": "no baseline",
    }
    assert compare_quality(NotMeasured("no text"), NotMeasured("no text")).not_measured["tokens"] == "no text"


def test_the_error_of_a_difference_is_that_of_pairs_where_the_prompts_are_the_same() -> None:
    own = np.random.default_rng(0).normal(0.4, 0.2, 16)
    engine = Score(perplexity=3.0, accuracy=0.5, tokens=10, coherence=own)
    dense = Score(perplexity=3.0, accuracy=0.5, tokens=10, coherence=own + 0.1)
    found = compare_quality(engine, dense)
    assert found.coherence == pytest.approx(own.mean(), rel=1e-12)
    assert found.coherence_error == pytest.approx(own.std(ddof=1) / 4, rel=1e-12)
    assert found.coherence_difference_error == pytest.approx(0, abs=1e-12)  # every prompt differs by the same
    trimmed = compare_quality(dataclasses.replace(engine, ratio=1.25), dense)
    assert trimmed.coherence_difference_error == pytest.approx(2**0.5 * own.std(ddof=1) / 4, rel=1e-12)


@pytest.mark.parametrize("logits", [[np.nan, 0.0], [-np.inf, 0.0], [-5000.0, 0.0]])
def test_a_perplexity_that_is_no_number_is_null_with_its_reason(logits: list[float]) -> None:
    with np.errstate(invalid="ignore"):
        score = measure_score(lambda ids: np.broadcast_to(np.array(logits), (*ids.shape, 2)), np.array([[0, 0, 0]]))
    quality = compare_quality(score, Score(perplexity=3.0, accuracy=0.5, tokens=2))
    assert isinstance(quality.perplexity, NotMeasured)
    assert "perplexity is" in quality.not_measured["perplexity"]
