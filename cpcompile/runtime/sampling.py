"""Choose the next token from logits.

    logits -> repetition penalty -> temperature -> top-k -> top-p -> one token

Sources: CTRL, arXiv 1909.05858, section 4.1 (repetition penalty); arXiv 1805.04833 (top-k); arXiv 1904.09751 (top-p);
Gumbel 1954 (the maximum of logits plus Gumbel noise is a sample of their softmax).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpcompile.core.coercion import coerce, require
from cpcompile.core.measured import field_types
from cpcompile.core.probabilities import require_numbers


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; the default is the most likely one."""

    temperature: float = 0.0
    """0 for the most likely token; the smaller, the more often likely tokens are chosen."""
    top_k: int = 0
    """Only so many of the most likely tokens are candidates; 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens that make up this probability are candidates."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the text so far become less likely."""

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            object.__setattr__(self, name, coerce(getattr(self, name), hint, name))
        require(self.temperature >= 0, f"temperature is {self.temperature}: it cannot be negative")
        require(self.top_k >= 0, f"top_k is {self.top_k}: it cannot be negative; 0 allows all tokens")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}: it has to be above 0 and at most 1")
        require(self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}: it has to be positive")

    def choose(self, logits: npt.NDArray[np.floating], seen: Sequence[int], generator: np.random.Generator) -> int:
        """The next token, for logits (vocabulary,) after the tokens `seen`; `generator` draws if temperature > 0.

        CpcompileError: logits that are not numbers.
        """
        require_numbers(logits)
        scores = logits.astype(np.float64)
        if self.repetition_penalty != 1:
            known = np.unique(np.asarray(seen, dtype=np.int64))
            old = scores[known]
            scores[known] = np.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
        if self.temperature == 0:
            return int(scores.argmax())
        scores /= self.temperature
        if 0 < self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        if self.top_p < 1:
            order = np.argsort(-scores, kind="stable")
            likelihood = np.exp(scores[order] - scores[order[0]])
            before = np.cumsum(likelihood / likelihood.sum()) - likelihood / likelihood.sum()
            scores[order[before >= self.top_p]] = -np.inf
        return int((scores + generator.gumbel(size=scores.shape)).argmax())
