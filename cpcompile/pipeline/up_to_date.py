"""What a build finds done: the whole bundle, or the results of engines that have not changed.

request       the model with its dense baseline and its calibration, the        the same: the bundle is up to date
              settings, the program
conditions    the dense baseline, the held-out text, how engines are            the same: so are the results of an
              validated, the program, the machine                               engine with the same content

Only what is good is kept: a report whose verdict is another than pass is made again. Nothing here imports the
libraries that a build needs, so that it takes no time to say that there is nothing to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cpcompile.bundle.manifest import MANIFEST
from cpcompile.bundle.reader import Bundle, Variant, open_bundle
from cpcompile.core.config import MIXED, ROUNDED, BuildConfig, ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.json_form import to_json
from cpcompile.core.paths import calibration_path, dense_path
from cpcompile.files.external_data import content_digest
from cpcompile.files.whole_files import file_digest
from cpcompile.machine.environment import environment
from cpcompile.machine.program import program_digest
from cpcompile.report import Report, read_report
from cpcompile.report.results import Results, VariantResult
from cpcompile.targets.requests import parse_targets

REQUEST, TEXT = "request", "held_out"
"""Keys of the bundle's metadata: `request_of`, and the digest of the held-out text."""
NONE = "none"
"""In place of the digest of a file that is not there."""
Digests = Mapping[str, str]
"""By name, what something depends on."""


def request_of(model: Path, config: BuildConfig, validation: ValidateConfig, data: Path | None) -> Digests:
    """What decides the engines that are built from `model`, besides its own content."""
    added = parse_targets(config.targets, config.precisions, config.profiles, config.search_seconds)
    settings = to_json(replace(config, validate=True)), _measured(validation) if added.candidates else None
    return {
        "dense baseline": dense_digest(model),
        "calibration": calibration_digest(model) if added.rounded else NONE,
        "text": "the model's own" if data is None else "given",
        "settings": _digest(settings),
        "program": program_digest(),
        "machine": _machine() if config.targets else "any",  # plans and `best` are made for this one
    }


def conditions_of(dense: str, text: str, validation: ValidateConfig) -> Digests:
    """What the results of an engine depend on besides its content; the digests of the dense baseline and the text."""
    return {
        "dense baseline": dense,
        "text": text,
        "validation": _digest(_measured(validation)),
        "program": program_digest(),
        "machine": _machine(),
    }


def finished_report(
    model: Path, out: Path, config: BuildConfig, validation: ValidateConfig, data: Path | None
) -> Report | None:
    """The report of the intact bundle `out` if it is what this build would make; None if it has to be made.

    The text in `data` is not read, so that with it nothing is known to be up to date.
    """
    if data is not None or not model.is_file() or not (out / MANIFEST).is_file():
        return None
    try:
        bundle, report = open_bundle(out), read_report(out)
        request = request_of(model, config, validation, data)
        if bundle.metadata.get(REQUEST) != request or bundle.metadata["checkpoint"] != file_digest(model):
            return None
        if config.validate:
            conditions = conditions_of(request["dense baseline"], str(bundle.metadata.get(TEXT)), validation)
            if report.verdict != "pass" or report.conditions != conditions:
                return None
        bundle.verify_all()
    except UsageError:  # damaged, or of another version
        return None
    return report


def kept_results(old: Path, new: Bundle, conditions: Digests) -> Results:
    """The results of engines in the bundle `old` that are also in `new`, if they were measured under `conditions`."""
    try:
        bundle, report = open_bundle(old), read_report(old)
        if report.verdict != "pass" or report.conditions != conditions:
            return {}
        bundle.verify_all()
    except UsageError:  # there is none, it is damaged, or of another version
        return {}
    return {
        context.name: tuple(each for each in context.variants if _is_same(each, context.name, bundle, new))
        for context in report.contexts
        if context.name in new.contexts
    }


def _is_same(result: VariantResult, context: str, old: Bundle, new: Bundle) -> bool:
    """Whether `result` holds for the engine of its name in `new`."""
    before, after = ({each.name: each for each in bundle.variants(context)}.get(result.name) for bundle in (old, new))
    if result.status != "ran" or before is None or after is None:
        return False
    tokenizers = [bundle.metadata["tokenizers"].get(context) for bundle in (old, new)]
    return tokenizers[0] == tokenizers[1] and _identity(before) == _identity(after)


def _identity(variant: Variant) -> object:
    content = (
        file_digest(variant.model)
        if variant.plan
        else content_digest(variant.model, variant.weights or variant.model.parent)
    )
    return content, variant.plan, variant.provider, variant.session_options, variant.provider_options, variant.feeds


def dense_digest(model: Path) -> str:
    """The digest of the dense baseline beside `model`, `NONE` if there is none."""
    return _digest_of(dense_path(model))


def calibration_digest(model: Path) -> str:
    """The digest of the calibration beside `model`, `NONE` if there is none."""
    return _digest_of(calibration_path(model))


def needed_calibration(bundle: Bundle) -> str:
    """The digest of the calibration that engines of `bundle` have their numbers from, `NONE` if they have none."""
    variants = [each for context in bundle.contexts for each in bundle.variants(context)]
    rounded = any(each.precision in (*ROUNDED, MIXED) for each in variants)
    return str(bundle.metadata.get(REQUEST, {}).get("calibration", NONE)) if rounded else NONE


def _digest_of(path: Path) -> str:
    return file_digest(path) if path.is_file() else NONE


def _measured(validation: ValidateConfig) -> object:
    """The settings that results depend on."""
    return to_json(replace(validation, jobs=1))


def _machine() -> str:
    machine = environment()
    return _digest([machine.cpu, machine.cores, machine.gpu])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
