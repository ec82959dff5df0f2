"""Measure every engine of a bundle against the eager model that it was compiled from."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from cpcompile.bundle import Bundle, Variant
from cpcompile.checkpoint import Checkpoint, save_checkpoint
from cpcompile.config import ValidateConfig
from cpcompile.errors import UsageError
from cpcompile.measure import ProcessMemory, available_cores
from cpcompile.models.language_model import LanguageModel
from cpcompile.runtime import Engine, create_session, feeds_of, load_engine, session_options
from cpcompile.validation.memory import Memory, compare_memory, measure_eager, measure_engine
from cpcompile.validation.parity import EagerReference, EngineRun, Parity, check_parity
from cpcompile.validation.placement import Placement, measure_placement
from cpcompile.validation.quality import IntArray, Quality, Run, Score, compare_quality, cut_windows, measure_score
from cpcompile.validation.speed import NO_SPINNING_AFTER_RUN, Speed, measure_speed
from cpcompile.vocabulary import TrimmedVocabulary, reencode

Progress = Callable[[str, int, int | None], None]
"""(stage, engines done, engines in all)."""

STAGE = "validate"
PLACEMENT_IDS = np.zeros((1, 16), dtype=np.int64)
NO_DENSE = "there is no dense baseline beside the model"
NO_TEXT = "there is no held-out text of this context"


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """All that is known about one engine. `status`: it was only built, it ran here, or it was skipped."""

    context: str
    name: str
    runtime: str
    precision: str
    bytes: int | None
    status: Literal["built", "ran", "skipped"]
    reason: str | None
    """Why it did not run."""
    parity: Parity
    quality: Quality
    memory: Memory
    speed: Speed
    placement: Placement

    @classmethod
    def not_run(
        cls,
        *,
        context: str,
        name: str,
        runtime: str,
        precision: str,
        status: Literal["built", "skipped"],
        reason: str,
        bytes: int | None = None,
    ) -> VariantResult:
        """An engine that could not be built, or not be run here: no numbers, one reason."""
        return cls(
            context=context,
            name=name,
            runtime=runtime,
            precision=precision,
            bytes=bytes,
            status=status,
            reason=reason,
            parity=Parity.without_numbers("inconclusive", reason),
            quality=compare_quality(reason, reason),
            memory=compare_memory(reason, reason),
            speed=Speed.not_run(reason),
            placement=Placement.not_run(reason),
        )


@dataclass(frozen=True, kw_only=True)
class _Against:
    """What all engines are compared with; made once."""

    checkpoint: Checkpoint
    reference: EagerReference
    dense: LanguageModel | None
    dense_memory: ProcessMemory | str
    config: ValidateConfig
    threads: int


@dataclass(frozen=True)
class _Text:
    """Held-out text of one context as its engine reads it."""

    ids: IntArray
    windows: IntArray
    token_ids: IntArray | None = None
    """The id of each of the engine's tokens in the whole vocabulary, where it has a part."""
    ratio: float = 1.0
    """Tokens for each of the whole vocabulary."""


def validate(
    bundle: Bundle,
    checkpoint: Checkpoint,
    dense: Checkpoint | None,
    config: ValidateConfig,
    *,
    held_out: Mapping[str, npt.NDArray[Any]],
    sequence: int,
    trimmed: Mapping[str, TrimmedVocabulary] | None = None,
    progress: Progress | None = None,
) -> tuple[VariantResult, ...]:
    """Parity, quality, memory, speed and placement of every engine in `bundle`.

    `held_out` maps a context to token ids (1-D), cut into windows of `sequence` predictions for quality; `trimmed`
    names the contexts that have a part of the vocabulary.
    UsageError: a context of the bundle that the checkpoint does not have, a damaged bundle.
    CpcompileError: an engine that cannot be loaded.
    """
    foreign = [context for context in bundle.contexts if context not in checkpoint.contexts]
    if foreign:
        raise UsageError(
            f"{bundle.root}: has the context {foreign[0]!r}, the checkpoint has {', '.join(checkpoint.contexts)}; "
            "validate a bundle with the checkpoint that it was built from"
        )
    variants = [variant for context in bundle.contexts for variant in bundle.variants(context)]
    report = progress or (lambda _stage, _done, _total: None)
    threads = config.threads or available_cores()
    results = []
    with _torch_threads(threads):
        report(STAGE, 0, len(variants))
        against = _Against(
            checkpoint=checkpoint,
            reference=EagerReference.of(checkpoint.model),
            dense=dense.model if dense else None,
            dense_memory=_dense_memory(dense, config, threads),
            config=config,
            threads=threads,
        )
        dense_scores: dict[str, Score | str] = {}
        for done, variant in enumerate(variants, start=1):
            context = variant.context
            ids = np.asarray(held_out.get(context, ()), dtype=np.int64)
            windows = cut_windows(ids, sequence)
            if context not in dense_scores:
                dense_scores[context] = _dense_score(against.dense, windows)
            text = _Text(ids, windows)
            if trimmed and context in trimmed:
                own = reencode(ids, checkpoint.tokenizer, trimmed[context])
                ratio = (len(own) - 1) / (len(ids) - 1) if len(ids) > 1 else 1.0
                text = _Text(own, cut_windows(own, sequence), trimmed[context].kept, ratio)
            results.append(_validate_variant(bundle, variant, against, text, dense_scores[context]))
            report(STAGE, done, len(variants))
    return tuple(results)


def _validate_variant(
    bundle: Bundle, variant: Variant, against: _Against, text: _Text, dense_score: Score | str
) -> VariantResult:
    config, windows = against.config, text.windows
    engine = load_engine(bundle, variant.context, variant.name, threads=against.threads)
    parity = check_parity(
        all_outputs(engine),
        dataclasses.replace(against.reference, token_ids=text.token_ids),
        against.checkpoint.contexts.index(variant.context),
        text.ids,
        config.shapes,
        config.tolerance_multiple,
    )
    if parity.verdict == "fail" and parity.max_abs_error is None:
        # Its outputs are not comparable logits: there is nothing to score, and no point in timing it.
        reason = f"parity failed: {parity.reason}"
        quality, speed = compare_quality(reason, dense_score), Speed.not_run(reason)
        memory, placement = compare_memory(reason, against.dense_memory), Placement.not_run(reason)
    else:
        score = measure_score(engine.run, windows, ratio=text.ratio) if len(windows) else NO_TEXT
        quality, speed = compare_quality(score, dense_score), _speed(variant, against, text)
        memory, placement = _memory(bundle, variant, against), measure_placement(variant, PLACEMENT_IDS)
    return VariantResult(
        context=variant.context,
        name=variant.name,
        runtime=variant.runtime,
        precision=variant.precision,
        bytes=variant.bytes,
        status="ran",
        reason=None,
        parity=parity,
        quality=quality,
        memory=memory,
        speed=speed,
        placement=placement,
    )


def all_outputs(engine: Engine) -> EngineRun:
    """Run `engine` for every output that its graph declares, not only for the one that is expected."""
    names = [output.name for output in engine.session.get_outputs()]
    return lambda ids: dict(zip(names, engine.session.run(names, feeds_of(engine.variant, ids)), strict=True))


def eager_run(model: LanguageModel, token_ids: IntArray | None = None) -> Run:
    """The ungated eager model as a function of numpy arrays; of `token_ids` where its input counts those."""

    def run(ids: IntArray) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            own = ids if token_ids is None else token_ids[ids]
            logits: npt.NDArray[np.float32] = model(torch.from_numpy(own)).numpy()
        return logits

    return run


def _dense_score(dense: LanguageModel | None, windows: IntArray) -> Score | str:
    if dense is None:
        return NO_DENSE
    return measure_score(eager_run(dense), windows) if len(windows) else NO_TEXT


def _speed(variant: Variant, against: _Against, text: _Text) -> Speed:
    config = against.config
    if not config.speed:
        return Speed.not_run("speed measurements were switched off")
    options = session_options(variant, threads=against.threads)
    for key, value in NO_SPINNING_AFTER_RUN.items():
        options.add_session_config_entry(key, value)
    return measure_speed(
        Engine(variant, create_session(variant, options)).run,
        eager_run(against.dense, text.token_ids) if against.dense else NO_DENSE,
        text.ids if len(text.ids) else np.zeros(1, dtype=np.int64),
        config.speed_shapes,
        rounds=config.rounds,
        threads=against.threads,
    )


def _memory(bundle: Bundle, variant: Variant, against: _Against) -> Memory:
    if not against.config.memory:
        return compare_memory(against.dense_memory, against.dense_memory)
    engine = measure_engine(bundle.root, variant.context, variant.name, threads=against.threads)
    return compare_memory(engine, against.dense_memory)


def _dense_memory(dense: Checkpoint | None, config: ValidateConfig, threads: int) -> ProcessMemory | str:
    """Memory of the dense baseline: the same for all engines. Held-out text and training data stay out of it."""
    if not config.memory:
        return "memory measurements were switched off"
    if dense is None:
        return NO_DENSE
    with tempfile.TemporaryDirectory(prefix="cpcompile-dense-") as folder:
        path = Path(folder) / "dense.pt"
        save_checkpoint(dataclasses.replace(dense, training={}, held_out={}), path)
        return measure_eager(path, threads=threads)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
