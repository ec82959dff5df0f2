"""`cpcompile inspect`: what a bundle holds, and how to load it; no engine is loaded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cpcompile.bundle.manifest import inside, read_json
from cpcompile.bundle.reader import Bundle, Variant, open_bundle
from cpcompile.core.cache import CacheBytes
from cpcompile.core.errors import UsageError
from cpcompile.core.generation import GenerationSettings
from cpcompile.pipeline.up_to_date import NONE, needed_calibration
from cpcompile.report.results import Verdict
from cpcompile.runtime.availability import why_not_here
from cpcompile.text.tokenization import parse_tokenizer

SCHEMA_VERSION = 1
MODELS = (".pt", ".pt2")
VERDICTS = get_args(Verdict)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens that a context knows."""

    tokens: int
    trimmed: bool
    """Whether the model knows more."""


@dataclass(frozen=True, kw_only=True)
class ContextContents:
    """One context; `None` is what the bundle does not record, or what a model that reads no text does not have."""

    name: str
    parameters: int
    dense_parameters: int
    """Those of the whole model."""
    vocabulary: Vocabulary | None
    cache: CacheBytes | None
    generation: GenerationSettings | None
    """Token ids are those of the engine."""


@dataclass(frozen=True, kw_only=True)
class EngineContents:
    """One engine."""

    contexts: tuple[str, ...]
    variant: str
    runtime: str
    precision: str
    provider: str
    """Execution provider of ONNX Runtime; empty for a TensorRT plan."""
    bytes: int
    """Its own files and its share of the weights."""
    runs_here: bool
    reason: str | None
    """Why it does not run here."""


@dataclass(frozen=True, kw_only=True)
class FileContents:
    """A file of weights."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How to load one of the contexts; `command` is None for a model that reads no text."""

    python: str
    cpp: str
    command: str | None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A bundle, as its manifest describes it."""

    path: str
    name: str
    bytes: int
    files: int
    verified: bool
    """Whether the digest of every file was compared now."""
    verdict: str | None
    """That of report.json, which no digest covers; None without a readable report."""
    checkpoint: str
    """SHA-256 of the model that it was built from."""
    calibration: str | None
    """SHA-256 of the calibration that its rounded weights are from; None if they are rounded to the nearest numbers."""
    weights: tuple[FileContents, ...]
    """Shared weights; engines that were built to stand alone have their own."""
    contexts: tuple[ContextContents, ...]
    engines: tuple[EngineContents, ...]
    best: str
    """The variant for the CPU that is opened unless another is named."""
    loading: Loading


def inspect_bundle(path: Path, *, verify: bool) -> Contents:
    """What the bundle `path` holds; `verify`: compare the digests of all files. UsageError: damaged, or no bundle."""
    if path.is_file():
        build = f"`cpcompile build {path}` writes" if path.suffix in MODELS else "`cpcompile build` wrote"
        raise UsageError(f"{path}: is a file, and a bundle is a folder; give the one that {build}")
    bundle = open_bundle(path)
    if verify:
        bundle.verify_all()
    return Contents(
        path=str(path),
        name=bundle.name,
        bytes=bundle.bytes,
        files=len(bundle.metadata["files"]),
        verified=verify,
        verdict=_verdict(bundle),
        checkpoint=bundle.metadata["checkpoint"],
        calibration=None if (digest := needed_calibration(bundle)) == NONE else digest,
        weights=tuple(_weights(bundle)),
        contexts=tuple(_contexts(bundle)),
        engines=tuple(_engines(bundle)),
        best=bundle.best,
        loading=_loading(bundle),
    )


def _contexts(bundle: Bundle) -> Iterator[ContextContents]:
    known: dict[Path, int] = {}
    for context in bundle.contexts:
        vocabulary = None
        if context in bundle.metadata["tokenizers"]:
            path = bundle.tokenizer(context)
            if path not in known:
                known[path] = _tokens(path)
            vocabulary = Vocabulary(tokens=known[path], trimmed=bundle.token_ids(context) is not None)
        counts = bundle.metadata["parameters"][context]
        yield ContextContents(
            name=context,
            parameters=counts["kept"],
            dense_parameters=counts["total"],
            vocabulary=vocabulary,
            cache=bundle.cache(context),
            generation=bundle.generation(context),
        )


def _tokens(tokenizer: Path) -> int:
    try:
        return int(parse_tokenizer(tokenizer.read_text(encoding="utf-8")).get_vocab_size())
    except (OSError, ValueError) as error:
        raise UsageError(f"{tokenizer}: cannot be read ({error}); build the bundle again") from error


def _engines(bundle: Bundle) -> Iterator[EngineContents]:
    shared: dict[str, tuple[Variant, list[str]]] = {}
    for context in bundle.contexts:
        variants = bundle.variants(context)
        own = len(bundle.components[context]["variants"])  # those of the router follow
        for variant in variants[:own]:
            yield _engine(variant, [context])
        for variant in variants[own:]:
            shared.setdefault(variant.name, (variant, []))[1].append(context)
    for variant, contexts in shared.values():
        yield _engine(variant, contexts)


def _engine(variant: Variant, contexts: Sequence[str]) -> EngineContents:
    reason = why_not_here(variant)
    return EngineContents(
        contexts=tuple(contexts),
        variant=variant.name,
        runtime=variant.runtime,
        precision=variant.precision,
        provider=variant.provider,
        bytes=variant.bytes,
        runs_here=reason is None,
        reason=reason,
    )


def _weights(bundle: Bundle) -> Iterator[FileContents]:
    """The files in the folders of shared weights, each once."""
    variants = [variant for context in bundle.contexts for variant in bundle.variants(context)]
    folders = {variant.weights.relative_to(bundle.root).as_posix() for variant in variants if variant.weights}
    for name, digest in bundle.metadata["files"].items():
        if any(name.startswith(f"{folder}/") for folder in folders):
            path = inside(bundle.root, name)
            if not path.is_file():
                raise UsageError(f"{path}: is missing from the bundle; build it again or copy it whole")
            yield FileContents(file=name, bytes=path.stat().st_size, sha256=digest)


def _verdict(bundle: Bundle) -> str | None:
    path = inside(bundle.root, "report.json")
    if not path.is_file():
        return None
    try:
        report = read_json(path)
    except UsageError:
        return None
    verdict = report.get("verdict") if isinstance(report, dict) else None
    return verdict if verdict in VERDICTS else None


def _loading(bundle: Bundle) -> Loading:
    path, context = str(bundle.root), bundle.contexts[0]
    text = context in bundle.metadata["tokenizers"]
    load = f"load({path!r}, context={context!r})" if text else f"load_engine({path!r}, {context!r})"
    return Loading(
        python=f"from cpcompile.runtime import {load.partition('(')[0]}\nengine = {load}",
        cpp=f"auto bundle = cpcompile::open_bundle({json.dumps(path)});\n"
        f"auto engine = cpcompile::load(bundle, {json.dumps(context)});",
        command=f'cpcompile run {shlex.quote(path)} --context {context} "Once upon a time"' if text else None,
    )
