"""The memory that the libraries take, measured by the smallest build, whose model takes next to nothing.

torch, onnx and what an export imports take many times the weights of a small model, and other versions and systems
take other amounts, so it is not a constant. The same build measures an engine and an eager model in processes of
their own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from cpcompile.core.config import BuildConfig, ModelConfig, ValidateConfig
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.measured import NotMeasured
from cpcompile.core.paths import dense_path
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.files.whole_files import scratch_folder
from cpcompile.frontend.checkpoint import Checkpoint, save_checkpoint
from cpcompile.machine.memory import peak_resident_bytes
from cpcompile.models.decoder import Decoder
from cpcompile.partitioning.hugging_face import transformers_package
from cpcompile.pipeline.build import build_bundle
from cpcompile.pipeline.estimation.duration import Pace, measure_operations
from cpcompile.text.tokenization import LEAST_VOCABULARY, train_tokenizer

T = TypeVar("T")
SHAPE = ModelConfig(vocabulary=LEAST_VOCABULARY, width=8, layers=1, heads=1, kv_heads=1, ffn=8, align=8)


@dataclass(frozen=True, kw_only=True)
class Libraries:
    """Resident bytes of the processes of the smallest build."""

    build: int
    validation: int
    engine: int
    eager: int
    pace: Pace | None = None
    """How long that build took; None if it was not built."""


def measure_libraries(model_type: str | None) -> Libraries:
    """Build the smallest model in this process, with what a model of transformers of that type imports.

    The imports stay in this process; a build in it needs them anyway.
    """
    if model_type is not None:
        _import_architecture(model_type)
    with scratch_folder("smallest") as folder:
        model = folder / "model.pt"
        _write_smallest(model)
        started = time.perf_counter()
        report, _ = build_bundle(
            model,
            folder / "model.cpc",
            BuildConfig(),
            ValidateConfig(speed=False, coherence=False, layers=False),
            progress=lambda _stage, _done, _total: None,
        )
        whole = time.perf_counter() - started
    built = _known(report.build.seconds)
    pace = Pace(build_seconds=built, validation_seconds=whole - built, operations=measure_operations())
    validation = peak_resident_bytes()
    memory = report.contexts[0].variants[0].memory
    return Libraries(
        build=_known(report.build.peak_rss_bytes),
        validation=validation,
        engine=_known(memory.run_peak_rss_bytes),
        eager=_known(memory.eager_run_peak_rss_bytes),
        pace=pace,
    )


def _known(size: T | NotMeasured) -> T:
    if isinstance(size, NotMeasured):
        raise CpcompileError(f"what the libraries take cannot be measured here: {size}")
    return size


def _write_smallest(path: Path) -> None:
    """A checkpoint of one context that keeps everything, and its dense baseline."""
    selection = Selection(("one",), dict.fromkeys((UnitKind.FFN, UnitKind.HEAD), np.ones((1, 1, 1), np.bool_)))
    tokenizer = train_tokenizer([""], LEAST_VOCABULARY).to_str()
    held_out = {"one": np.zeros(8, dtype=np.int32)}
    for contexts, file in ((1, path), (0, dense_path(path))):
        checkpoint = Checkpoint(
            config=SHAPE,
            state=Decoder(SHAPE, contexts=contexts).state_dict(),
            contexts=selection.contexts,
            tokenizer=tokenizer,
            selection=selection if contexts else None,
            held_out=held_out,
        )
        save_checkpoint(checkpoint, file)


def _import_architecture(model_type: str) -> None:
    """Import the code of a model of that type."""
    transformers = transformers_package()
    try:
        _ = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(transformers.AutoConfig.for_model(model_type))]
    except (ValueError, KeyError, ImportError) as error:
        raise UsageError(f"transformers {transformers.__version__} has no causal {model_type!r}: {error}") from error
