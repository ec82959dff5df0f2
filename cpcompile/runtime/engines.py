"""The engines of many contexts in one process.

engines["german"] -> loaded already?  -> the engine
                     else loaded with weights that all share; the least recently used leave if memory is short
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from threading import RLock
from types import TracebackType
from typing import Any

from cpcompile.bundle.reader import BEST, Bundle, open_bundle
from cpcompile.core.coercion import require
from cpcompile.core.errors import UsageError
from cpcompile.runtime.engine import load_variant, require_threads
from cpcompile.runtime.shared_weights import SharedWeights
from cpcompile.runtime.text_engine import TextEngine, choose_variant, with_tokenizer
from cpcompile.targets.requests import OPENVINO

SESSION_BYTES = 8_000_000
"""What a session takes besides its weights: measured, 5 to 8 MB for graphs of 200 to 600 nodes."""


class Engines(Mapping[str, TextEngine]):
    """Context -> engine, loaded when it is asked for. Threads may share it, and the engines."""

    def __init__(self, bundle: Bundle, variant: str, *, max_memory: int | None, threads: int) -> None:
        self._bundle = bundle
        self._variant = variant
        self._max_memory = max_memory
        self._threads = threads
        self._weights = SharedWeights()
        self._loaded: OrderedDict[str, TextEngine] = OrderedDict()
        self._lock = RLock()
        self._closed = False

    def __getitem__(self, context: str) -> TextEngine:
        with self._lock:
            if self._closed:
                raise UsageError(f"the engines of {self._bundle.root} were closed; open them again with load_all")
            if context not in self._loaded:
                if context not in self._bundle.contexts:
                    raise KeyError(f"there is no context {context!r}; there are {', '.join(self._bundle.contexts)}")
                self._loaded[context] = self._load(context)
                self._make_room()
            self._loaded.move_to_end(context)
            return self._loaded[context]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.contexts)

    def __len__(self) -> int:
        return len(self._bundle.contexts)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The contexts that are in memory, the most recently used last."""
        with self._lock:
            return tuple(self._loaded)

    def close(self) -> None:
        """Give the memory back; engines that are still held elsewhere stay usable, and keep theirs."""
        with self._lock:
            self._closed = True
            self._loaded.clear()
            self._weights = SharedWeights()

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, context: str) -> TextEngine:
        variant = self._bundle.variant(context, choose_variant(self._bundle, context, self._variant))
        for other in self._loaded.values():
            if other.engine.variant.model == variant.model:  # a merged engine, which is there already
                return with_tokenizer(self._bundle, replace(other.engine, variant=variant))

        if variant.runtime == OPENVINO:
            raise UsageError(
                f"{variant.model}: load_all shares the weights of ONNX Runtime's engines, and this is one of OpenVINO; "
                "choose another variant, or open it with load"
            )

        def configure(options: Any) -> None:
            # Each session has its own threads: a pool for all of them would forbid the application any other session.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self._weights.give_to(options, variant)

        engine = load_variant(self._bundle, variant, threads=self._threads, configure=configure)
        return with_tokenizer(self._bundle, engine)

    def _make_room(self) -> None:
        """Let the least recently used engines go until the others fit; the last one stays."""
        left = False
        while self._max_memory is not None and len(self._loaded) > 1 and self._bytes() > self._max_memory:
            self._loaded.popitem(last=False)
            left = True
        if left:
            self._weights.forget_pages()

    def _bytes(self) -> int:
        """The weights of all loaded engines, each counted once, and what their sessions take."""
        variants = [each.engine.variant for each in self._loaded.values()]
        models = {variant.model for variant in variants}
        own = sum(SESSION_BYTES + model.stat().st_size for model in models)
        return own + self._weights.bytes_of(variants)


def load_all(
    bundle: Bundle | str | PathLike[str], variant: str = BEST, *, max_memory: int | None = None, threads: int = 0
) -> Engines:
    """The engines of all contexts, by name, with the weights that they share in memory once.

    Each is verified and loaded when it is asked for. max_memory: bytes; where more would be in use, those that were not
    used for the longest time are unloaded. The estimate counts weights and sessions, not what a run takes for a while.
    threads: of each engine, which sleep while it does not run. variant and errors: as in `load`. A single engine is a
    little faster with `load`, which rearranges its weights for the processor in a copy of its own.
    """
    threads = require_threads(threads)
    limit = max_memory is None or (type(max_memory) is int and max_memory > 0)
    require(limit, f"max_memory is {max_memory!r:.80}: give a number of bytes")
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return Engines(opened, variant, max_memory=max_memory, threads=threads)
