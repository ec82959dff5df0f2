"""Choosing a token: each option by itself, together, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpcompile.core.errors import UsageError
from cpcompile.runtime.sampling import Sampling

LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))


def shares(sampling: Sampling, seen: list[int] | None = None, draws: int = 20_000) -> np.ndarray:
    generator = np.random.default_rng(0)
    tokens = [sampling.choose(LOGITS, seen or [], generator) for _ in range(draws)]
    return np.bincount(tokens, minlength=4) / draws


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [1, 0, 0, 0]),
        (Sampling(temperature=1.0), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(temperature=0.5), softmax(2 * LOGITS)),
        (Sampling(temperature=2.0), softmax(LOGITS / 2)),
        (Sampling(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(temperature=1.0, top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(temperature=1.0, top_p=0.5), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.001), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_k=3, top_p=0.1), [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling, expected: list[float]) -> None:
    # The standard deviation of a share is at most 0.0036 with so many draws.
    assert np.abs(shares(sampling) - expected).max() <= 0.015


def test_a_repetition_penalty_makes_tokens_of_the_text_less_likely() -> None:
    assert Sampling(repetition_penalty=1.5).choose(LOGITS, [0, 0, 2], np.random.default_rng(0)) == 1
    expected = softmax(LOGITS * [1.5, 1, 1, 1])  # logits below 0 are multiplied
    assert np.abs(shares(Sampling(temperature=1.0, repetition_penalty=1.5), [0]) - expected).max() <= 0.015
    positive = np.array([3.0, 2.5, -1.0])
    assert Sampling(repetition_penalty=1.5).choose(positive, [0], np.random.default_rng(0)) == 1


def test_half_precision_and_extremes_are_chosen_from() -> None:
    generator = np.random.default_rng(0)
    for options in ({}, {"temperature": 1e-6}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.7, "top_k": 2}):
        logits = np.array([-6e4, 6e4, 6e4 - 100], dtype=np.float16)
        assert Sampling(**options).choose(logits, [1], generator) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1}, "temperature is -1.0: it cannot be negative"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k is -1: it cannot be negative; 0 allows all tokens"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0}, "top_p is 0.0: it has to be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01: it has to be above 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0: it has to be positive"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Sampling(**options)
