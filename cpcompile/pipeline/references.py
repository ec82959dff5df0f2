"""A bundle that was built before, and the eager side that its engines are compared with."""

from __future__ import annotations

from pathlib import Path

from cpcompile.bundle.reader import Bundle, open_bundle
from cpcompile.core.config import ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.paths import calibration_path
from cpcompile.core.rounding import UNCALIBRATED, Calibration
from cpcompile.core.types import Progress
from cpcompile.files.whole_files import file_digest, remove_leftovers
from cpcompile.frontend.source import Source, open_source
from cpcompile.pipeline.up_to_date import NONE, calibration_digest, needed_calibration
from cpcompile.text.vocabulary import TrimmedVocabulary
from cpcompile.validation.open_reference import open_reference
from cpcompile.validation.reference import Reference


def open_with_model(path: Path, model: Path, progress: Progress) -> tuple[Bundle, Source]:
    """The bundle `path`, intact, and the model that it was built from; UsageError if it was built from another."""
    progress("load", 0, 1)
    remove_leftovers(path.absolute().parent)
    bundle = open_bundle(path)
    bundle.verify_all()
    if not model.exists():
        raise UsageError(f"{model}: there is no such file; --model names the model that {path} was built from")
    source = open_source(model)
    require_own_model(bundle, source)
    progress("load", 1, 1)
    return bundle, source


def require_own_model(bundle: Bundle, source: Source) -> None:
    """UsageError if `bundle` was built from another model."""
    if file_digest(source.path) != bundle.metadata["checkpoint"]:
        raise UsageError(
            f"{bundle.root}: was not built from {source.path}; give its own model with --model, or build it again"
        )


def calibration_of(bundle: Bundle, source: Source) -> Calibration:
    """What the engines of `bundle` round parameters to; UsageError if the file that says it is not there any more."""
    if (digest := needed_calibration(bundle)) == NONE:
        return UNCALIBRATED
    if (found := calibration_digest(source.path)) != digest:
        name = calibration_path(source.path).name
        what = f"there is no {name}" if found == NONE else f"the {name} is not the one"
        raise UsageError(
            f"{bundle.root}: {what} beside {source.path} that its engines have their numbers from; put it there, or "
            "build the bundle again"
        )
    return source.calibration


def trimmed_vocabularies(bundle: Bundle) -> dict[str, TrimmedVocabulary]:
    """The vocabularies by context, for the contexts that have their own."""
    return {
        context: TrimmedVocabulary(bundle.tokenizer(context).read_text(encoding="utf-8"), ids)
        for context in bundle.contexts
        if (ids := bundle.token_ids(context)) is not None
    }


def reference_of(
    bundle: Bundle, source: Source, config: ValidateConfig, *, data: Path | None, progress: Progress
) -> Reference:
    """What the engines of `bundle` are compared with, on the held-out text of `data` or on that of `source`."""
    return open_reference(
        source,
        config,
        data=data,
        trimmed=trimmed_vocabularies(bundle),
        progress=progress,
        calibration=calibration_of(bundle, source),
    )
