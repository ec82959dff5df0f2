from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cpcompile.validation.coherence import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, measure_coherence

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
SUBJECTS, WORDS = 4, 8
IDS = np.concatenate([RNG.integers(s * WORDS, (s + 1) * WORDS, 2000) for s in range(SUBJECTS)])
"""Text about one subject after the other, each with words of its own."""
EMBEDDINGS = np.repeat(np.eye(SUBJECTS), WORDS, axis=0) + 0.05 * RNG.standard_normal((SUBJECTS * WORDS, SUBJECTS))


def writer(stays: float) -> Any:
    """A model that goes on about the subject of the last token, or about any with the rest of its probability."""

    def run(ids: Array) -> Array:
        own = (ids[..., None] // WORDS) == (np.arange(SUBJECTS * WORDS) // WORDS)
        return np.log(np.where(own, stays + (1 - stays) / SUBJECTS, (1 - stays) / SUBJECTS) / WORDS + 1e-12)

    return run


def test_text_that_stays_with_its_subject_is_coherent() -> None:
    found = [measure_coherence(writer(stays), IDS, EMBEDDINGS).mean() for stays in (1.0, 0.95, 0.0)]
    assert found[0] > 0.98
    assert found[0] > found[1] > found[2] + 0.2
    assert abs(found[2]) < 0.3
    twice = [measure_coherence(writer(0.5), IDS, EMBEDDINGS) for _ in range(2)]
    assert twice[0].shape == (PROMPTS,) and np.array_equal(*twice)


def test_prompts_are_spread_over_the_text_and_continued() -> None:
    shapes: list[tuple[int, ...]] = []

    def run(ids: Array) -> Array:
        shapes.append(ids.shape)
        return writer(1.0)(ids)

    measure_coherence(run, IDS, EMBEDDINGS)
    assert shapes == [(PROMPTS, PROMPT_TOKENS + new) for new in range(NEW_TOKENS)]


def test_leading_tokens_stand_before_every_prompt_and_are_no_text() -> None:
    seen: list[Array] = []

    def run(ids: Array) -> Array:
        seen.append(ids)
        return writer(0.5)(ids)

    given = measure_coherence(run, IDS, EMBEDDINGS, leading=(7, 3))
    assert np.array_equal(given, measure_coherence(writer(0.5), IDS, EMBEDDINGS))
    assert all(np.array_equal(ids[:, :2], np.tile([7, 3], (PROMPTS, 1))) for ids in seen)


@pytest.mark.parametrize(("length", "measured"), [(0, False), (PROMPT_TOKENS - 1, False), (PROMPT_TOKENS, True)])
def test_text_without_a_prompt_has_no_coherence(length: int, measured: bool) -> None:
    assert (measure_coherence(writer(1.0), IDS[:length], EMBEDDINGS) is not None) is measured
