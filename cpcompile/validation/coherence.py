"""Coherence: does generated text stay on topic?

    prompt -> continuation, sampled at temperature 1     coherence of a prompt = cos(e(prompt), e(continuation))

e is the mean of the dense baseline's token embeddings minus the mean over the held-out text, so that what all text has
in common does not count. Engine and dense baseline continue the same prompts with the same
random numbers. After Li et al., Contrastive Decoding (arXiv 2210.15097), who take SimCSE for e.

A mean near that of the dense baseline is good. With so few prompts it is a check on generation as a whole, not a fine
measure: `quality` gives the standard errors of the means and of their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cpcompile.core.types import Array

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 24


def measure_coherence(
    run: Callable[[Array], Array], ids: Array, embeddings: Array, *, leading: Sequence[int] = (), seed: int = 0
) -> Array | None:
    """Coherence of what `run` (ids (batch, sequence) -> logits) generates, by prompt; None for text below one prompt.

    ids: held-out text (1-D), of which prompts are taken at even distances; `run` sees them after the ids `leading`.
    embeddings: (vocabulary, width), the rows in the order of `ids`.
    """
    if len(ids) < PROMPT_TOKENS:
        return None
    starts = np.linspace(0, len(ids) - PROMPT_TOKENS, PROMPTS).astype(np.int64)
    prompts = np.stack([ids[start : start + PROMPT_TOKENS] for start in starts])
    common = embeddings[ids].mean(axis=0, dtype=np.float64)
    start = np.tile(np.asarray(leading, dtype=prompts.dtype), (PROMPTS, 1))
    text = _continue(run, np.concatenate([start, prompts], axis=1), np.random.default_rng(seed))
    # Only of the tokens that occur: the whole table in float64 would be the largest array of all.
    before, after = (
        embeddings[part].mean(axis=1, dtype=np.float64) - common for part in (prompts, text[:, -NEW_TOKENS:])
    )
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosines: Array = (before * after).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return cosines


def _continue(run: Callable[[Array], Array], prompts: Array, rng: np.random.Generator) -> Array:
    """The prompts with NEW_TOKENS sampled tokens each, by the Gumbel-max trick (Gumbel 1954)."""
    text = prompts
    for _ in range(NEW_TOKENS):
        logits = run(text)[:, -1].astype(np.float64)
        chosen = (logits + rng.gumbel(size=logits.shape)).argmax(axis=-1)
        text = np.concatenate([text, chosen[:, None]], axis=1)
    return text
