"""The loop that generates tokens: prompts -> the cache -> one token for each of them, again and again.

Prompts of unequal lengths are filled up in front, where the attention mask leaves them out. The cache stays in buffers
that steps read and write without a copy (`cache_buffers`). Engines without a cache read the whole text again for every
token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cpcompile.core.coercion import coerce, require
from cpcompile.core.types import Array
from cpcompile.runtime.sampling import Sampling

if TYPE_CHECKING:
    from cpcompile.runtime.engine import Engine

Logits = npt.NDArray[np.float32]
Step = Callable[[Array, Array, Array], Logits]
"""Tokens, mask and positions -> logits of the last token; see `Engine.cached_steps`."""
FILLER = 0
"""The token in front of shorter prompts and behind finished texts; no token looks at it."""


def decode(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    sampling: Sampling,
    end: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[list[int | None]]:
    """Per step, the next token of each prompt, at most `tokens`; None once a token of `end` completed it.

    The token that completes a text is not given. Prompts have at least one token. UsageError, before anything runs: a
    negative number of tokens or seed.
    """
    tokens, seed = coerce(tokens, int, "tokens"), coerce(seed, int | None, "seed")
    for name, number in (("tokens", tokens), ("seed", seed or 0)):
        require(number >= 0, f"{name} is {number}: it cannot be negative")
    return _decode(engine, prompts, tokens, sampling, end, np.random.default_rng(seed))


def _decode(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling,
    end: Collection[int],
    generator: np.random.Generator,
) -> Iterator[list[int | None]]:
    texts = [list(prompt) for prompt in prompts]
    going = [True] * len(texts)
    steps = _with_cache(engine, texts, tokens) if engine.has_cache else _without_cache(engine, texts)
    for _ in range(tokens):
        logits = next(steps)
        chosen: list[int | None] = []
        for row, text in enumerate(texts):
            token = sampling.choose(logits[row], text, generator) if going[row] else FILLER
            going[row] &= token not in end
            text.append(token)
            chosen.append(token if going[row] else None)
        if not any(going):
            return
        yield chosen


def _with_cache(engine: Engine, texts: Sequence[list[int]], tokens: int) -> Iterator[Logits]:
    """The logits (batch, vocabulary) after `texts`, which the caller extends by one of `tokens` between the steps."""
    longest = max(map(len, texts))
    ids = np.full((len(texts), longest), FILLER, dtype=np.int64)
    mask = np.zeros((len(texts), longest), dtype=np.int64)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :] = text
        mask[row, longest - len(text) :] = 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    step = engine.cached_steps(len(texts), longest + tokens)
    while True:
        yield step(ids, mask, positions)
        ids = np.array([[text[-1]] for text in texts], dtype=np.int64)
        mask = np.concatenate([mask, np.ones((len(texts), 1), dtype=np.int64)], axis=1)
        positions = positions[:, -1:] + 1


def _without_cache(engine: Engine, texts: Sequence[list[int]]) -> Iterator[Logits]:
    """The same by reading the whole texts; behind the shorter ones stand tokens at which nothing looks."""
    while True:
        longest = max(map(len, texts))
        logits = engine.run([[*text, *[FILLER] * (longest - len(text))] for text in texts])
        yield logits[np.arange(len(texts)), [len(text) - 1 for text in texts]]
