"""What rounding each parameter costs, measured one parameter at a time on the eager model.

The cost is the divergence KL(model || model with that parameter rounded), in nats per token: it is never negative, and
far less noisy than a difference of losses. Costs of several parameters add up well enough to rank them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from cpcompile.core.cache import OUTPUT
from cpcompile.core.probabilities import log_softmax
from cpcompile.core.rounding import Scheme
from cpcompile.core.types import Feeds, Steps
from cpcompile.validation.language_reference import LanguageReference
from cpcompile.validation.reference import Run

WINDOWS = 2
"""Windows of text per context: with a few hundred tokens the ranking is steady."""


def rounding_costs(
    reference: LanguageReference,
    rounded: Mapping[str, Collection[str]],
    scheme: Scheme,
    *,
    deadline: float,
    steps: Steps,
) -> dict[str, float]:
    """The mean cost over the contexts of rounding each parameter by `scheme`, and no other.

    rounded: context -> the parameters that its engine rounds; a parameter costs nothing where it is not among them.
    deadline: on the clock of `time.perf_counter`; what was not measured by then is left out.
    """
    samples = {context: reference.sample(context, WINDOWS) for context in rounded}
    exact = {c: _log_probabilities(reference.masked(c), feeds).astype(np.float32) for c, feeds in samples.items()}
    costs: dict[str, float] = {}
    names = dict.fromkeys(name for own in rounded.values() for name in own)
    for done, name in enumerate(names):
        steps(done, len(names))
        if time.perf_counter() > deadline:
            break
        divergences = [
            _divergence(exact[context], _log_probabilities(reference.masked(context, {name: scheme}), feeds))
            for context, feeds in samples.items()
            if name in rounded[context]
        ]
        costs[name] = sum(divergences) / len(rounded)
    steps(len(names), len(names))
    return costs


def _log_probabilities(run: Run, feeds: Feeds) -> npt.NDArray[np.float64]:
    return log_softmax(run(feeds)[OUTPUT])


def _divergence(exact: npt.NDArray[np.floating], other: npt.NDArray[np.floating]) -> float:
    """The mean over the positions of KL(exact || other)."""
    return float((np.exp(exact) * (exact - other)).sum(axis=-1).mean())
