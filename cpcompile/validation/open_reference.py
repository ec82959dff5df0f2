"""The eager side of a validation, for whatever a bundle is built from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cpcompile.core.config import ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.rounding import UNCALIBRATED, Calibration
from cpcompile.core.types import Progress
from cpcompile.frontend.source import ProgramSource, Source, TrainedSource
from cpcompile.text.vocabulary import TrimmedVocabulary
from cpcompile.validation.language_reference import LanguageReference
from cpcompile.validation.program_reference import ProgramReference
from cpcompile.validation.reference import Reference


def open_reference(
    source: Source,
    config: ValidateConfig,
    *,
    data: Path | None,
    trimmed: Mapping[str, TrimmedVocabulary],
    progress: Progress,
    calibration: Calibration = UNCALIBRATED,
) -> Reference:
    """The reference of `source`, on the held-out text of `data` or on that of the source."""
    if isinstance(source, TrainedSource):
        return LanguageReference(
            source.checkpoint,
            source.dense,
            config,
            held_out=source.held_out(data, progress),
            sequence=source.sequence,
            trimmed=trimmed,
            calibration=calibration,
        )
    assert isinstance(source, ProgramSource)
    if data is not None:
        raise UsageError(f"{source.path}: is a program and is compared on the examples that it brings; leave --data")
    return ProgramReference(source.path, source.program)
