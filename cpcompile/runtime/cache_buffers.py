"""Where the cache of a batch of texts lies from one step to the next.

joined      a step writes past and new tokens to a new buffer, which the next step reads       standard operators
in place    a step writes new tokens into the buffer that it reads, behind those of before     GroupQueryAttention
passed      a step gives the cache, and takes it again like any other input                    other runtimes
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from cpcompile.core.cache import INPUT, LENGTH, MASK, OUTPUT, PAST
from cpcompile.core.errors import UsageError
from cpcompile.core.types import Array, Feeds

AHEAD = 1024
"""Tokens for which there is room, at most; memory that nothing was written to is not taken."""


def require_cache(model: Path, cache: object, names: Collection[str], texts: int) -> None:
    """UsageError unless `cache` is none, or has every part of the cache of `model`, of so many texts of one length."""
    if cache is None or cache == {}:
        return
    if not isinstance(cache, Mapping) or cache.keys() != set(names):
        raise UsageError(f"{model}: the cache is not of this engine; give the one that `step` returned")
    try:
        shapes = {np.shape(value)[:1] + np.shape(value)[LENGTH : LENGTH + 1] for value in cache.values()}
    except ValueError as error:  # lists of different lengths
        raise UsageError(f"{model}: the cache is not of this engine; give the one that `step` returned") from error
    if len(shapes) > 1 or next(iter(shapes))[:1] != (texts,):
        raise UsageError(
            f"{model}: input_ids has {texts} rows, the cache (texts, tokens) {', '.join(map(str, sorted(shapes)))}; "
            "every part needs as many texts, of one length"
        )


def require_fit(model: Path, feeds: Feeds, names: Collection[str]) -> None:
    """UsageError unless the cache among `feeds`, if any, is whole, and the mask, if any, covers it and the new tokens.

    names: the inputs of a whole cache.
    """
    if INPUT not in feeds:
        return
    cache = {name: value for name, value in feeds.items() if PAST.fullmatch(name)}
    require_cache(model, cache, names, len(feeds[INPUT]))
    if MASK not in feeds:
        return
    given, new = feeds[MASK].shape[1], feeds[INPUT].shape[1]
    past = next(iter(cache.values())).shape[LENGTH] if cache else 0
    if given != past + new:
        raise UsageError(
            f"{model}: {MASK} covers {given} tokens; the cache has {past} and {INPUT} {new}, so {past + new} are needed"
        )


Runs = Callable[[Feeds, int], Array]
"""Inputs beside the cache, and the tokens that each text has after the run -> logits. The cache goes on by itself."""


def cached_runs(
    session: Any, presents: Mapping[str, str], empty: Feeds, constants: Feeds, in_place: int | None
) -> Runs:
    """Runs of a session, each of which goes on with the cache of the one before.

    presents: input of the past -> output of the present. empty: those inputs before the first token. constants: inputs
    that stay the same. in_place: if the cache is written in place, the tokens that each text has in the end.
    """
    if not isinstance(session, ort.InferenceSession):
        return _passed(session, presents, empty, constants)
    binding = session.io_binding()
    for name, value in constants.items():
        binding.bind_cpu_input(name, value)
    cache: CacheBuffers = Joined(binding, presents, empty)
    if in_place is not None:
        cache = InPlace(binding, presents, empty, in_place)

    def run(feeds: Feeds, tokens: int) -> Array:
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        binding.bind_output(OUTPUT)
        cache.before(tokens)
        session.run_with_iobinding(binding)
        cache.after()
        logits: Array = binding.get_outputs()[0].numpy()
        return logits

    return run


def _passed(session: Any, presents: Mapping[str, str], empty: Feeds, constants: Feeds) -> Runs:
    cache = {name: empty[name] for name in presents}

    def run(feeds: Feeds, _tokens: int) -> Array:
        logits, *present = session.run([OUTPUT, *presents.values()], {**feeds, **constants, **cache})
        cache.update(zip(presents, present, strict=True))
        result: Array = logits
        return result

    return run


class CacheBuffers(Protocol):
    """Binds the cache to a session before each run, and takes over what it wrote after it."""

    def before(self, tokens: int) -> None:
        """Before a run after which each text has so many `tokens`."""

    def after(self) -> None:
        """After the run; outputs of the binding are the logits, and then the cache."""


class Joined:
    """Buffers that ONNX Runtime allocates anew for every step."""

    def __init__(self, binding: Any, presents: Mapping[str, str], empty: Mapping[str, Array]) -> None:
        """presents: input of the past -> output of the present; empty: those inputs before the first token."""
        self._binding, self._presents = binding, presents
        for name in presents:
            binding.bind_cpu_input(name, empty[name])

    def before(self, tokens: int) -> None:
        for present in self._presents.values():  # anew, or buffers would be written while they are read
            self._binding.bind_output(present)

    def after(self) -> None:
        _, *presents = self._binding.get_outputs()
        for past, value in zip(self._presents, presents, strict=True):
            self._binding.bind_ortvalue_input(past, value)


class InPlace:
    """One buffer for each part of the cache, which grows when it is full."""

    def __init__(self, binding: Any, presents: Mapping[str, str], empty: Mapping[str, Array], most: int) -> None:
        """most: the tokens that each text has in the end, if it is not more; the others as in `Joined`."""
        self._binding, self._presents, self._most = binding, presents, most
        self._buffers = {name: empty[name] for name in presents}
        self._room = self._filled = 0

    def before(self, tokens: int) -> None:
        if tokens > self._room:
            self._room = max(tokens, min(self._most, tokens + AHEAD))
            for past in self._presents:
                self._grow(past)
        self._filled = tokens

    def after(self) -> None:
        """Nothing: the tokens are where the next step reads them."""

    def _grow(self, past: str) -> None:
        old = self._buffers[past]
        batch, heads, _, channels = old.shape
        new = np.empty((batch, heads, self._room, channels), old.dtype)
        new[:, :, : self._filled] = old[:, :, : self._filled]
        self._buffers[past] = new
        value = ort.OrtValue.ortvalue_from_numpy(new)  # on the CPU it is that array, not a copy
        self._binding.bind_ortvalue_input(past, value)
        self._binding.bind_ortvalue_output(self._presents[past], value)
