"""Open a bundle `model.cpc/`: an ONNX Runtime model package (schema 1.0), components = contexts.

    manifest.json                       components, and under additional_metadata.cpcompile the digest of every file
    <context>/component.json            variants = runtime + precision
    <context>/<variant>/model.onnx      graph; its weights are slices of one shared file
    <context>/<variant>/engine.plan     a TensorRT plan with its own weights; executor_info.tensorrt says what runs it
    <context>/openvino-*/model.onnx     a graph for OpenVINO; executor_info.openvino names its weights
    router/cpu-fp32-merged/model.onnx   all contexts in one graph, with the context as an input
    shared_assets/sha256-<hex>/         weights.bin; tokenizer.json, and token_ids.npy where it was trimmed
    report.json                         the results of validation (not covered by the digests)

Reading needs neither torch nor onnxruntime. Everything is checked before it is used: the manifest against its own
digest, each file against the manifest, each path against the root, and the files that an engine makes its runtime open
against both. Digests reveal damage, not the author: a bundle sealed by a stranger can take any amount of time and
memory, but it cannot open a file outside of it, load a library or write a file. It must not change while it is in use.
Source of the format: microsoft/onnxruntime, model_package/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpcompile.bundle.manifest import (
    MANIFEST,
    PROVIDER_OPTIONS,
    READABLE,
    REPORTS,
    SESSION_OPTIONS,
    inside,
    manifest_digest,
    read_json,
    require,
    require_name,
    verify_file,
)
from cpcompile.core.cache import CacheBytes
from cpcompile.core.coercion import as_path
from cpcompile.core.errors import UsageError
from cpcompile.core.generation import GenerationSettings
from cpcompile.files.external_data import embed_data, references_of
from cpcompile.targets.plan_info import PlanInfo
from cpcompile.targets.requests import OPENVINO

if TYPE_CHECKING:
    import onnx_ir as ir


TOKEN_IDS = "token_ids.npy"
"""The file beside tokenizer.json where the vocabulary of a context was trimmed; see `Bundle.token_ids`."""
ROUTER = "router"
"""The component of engines that serve several contexts."""
BEST, EXACT = "best", "cpu-fp32"
"""In place of the name of a variant, what the build chose; and what is chosen if nothing is."""
PLAN = "tensorrt"
"""The key of plans in `executor_info`."""
WEIGHTS = "weights"
"""The key of the shared weights of an OpenVINO engine in `executor_info`."""
CPU_PROVIDER = "CPUExecutionProvider"
WEIGHTS_OPTION = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One engine of one context in a bundle."""

    context: str
    name: str
    runtime: str
    precision: str
    provider: str
    """Execution provider of ONNX Runtime; empty for engines that it does not run."""
    model: Path
    weights: Path | None
    """The folder of the shared weights."""
    session_options: Mapping[str, str]
    provider_options: Mapping[str, str]
    feeds: Mapping[str, int]
    """The inputs that select the context, where the engine serves several."""
    bytes: int
    """The bytes of its own files and of its share of the weights."""
    plan: PlanInfo | None = None
    """What a TensorRT plan was built by and for; None if the engine is an ONNX graph."""

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the processor."""
        return self.runtime == OPENVINO or self.provider == CPU_PROVIDER

    def graph(self) -> ir.Model:
        """The graph of a verified engine, whose weights stay in their file; UsageError for a plan."""
        from cpcompile.files.onnx_file import load_onnx  # running engines does not need onnx_ir

        self._require_graph()
        return load_onnx(self.model, data=self.weights)

    def save_standalone(self, path: Path) -> None:
        """Write the graph of a verified engine to `path`, with all weights inside; UsageError for a plan."""
        self._require_graph()
        embed_data(self.model, self.weights or self.model.parent, path)

    def _require_graph(self) -> None:
        if self.plan:
            raise UsageError(f"{self.model}: is a plan of {self.runtime}, not an ONNX graph; choose another variant")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle: its manifest has been checked; `verify` checks its files before they are loaded."""

    root: Path
    name: str
    contexts: tuple[str, ...]
    metadata: Mapping[str, Any]
    """Records of the build: context indices, parameter accounting, source checkpoint, digests."""
    components: Mapping[str, Mapping[str, Any]]

    def tokenizer(self, context: str) -> Path:
        """The verified tokenizer.json of `context`; UsageError if the model does not read text."""
        self._require_context(context)
        if context not in self.metadata["tokenizers"]:
            raise UsageError(f"{self.root}: has no tokenizer of {context!r}; it was built from a program")
        path = self._asset(self.metadata["tokenizers"][context]) / "tokenizer.json"
        self.verify(path)
        return path

    def token_ids(self, context: str) -> npt.NDArray[np.int64] | None:
        """The id of each token of `context` in the full vocabulary; None if the vocabulary was not trimmed."""
        self._require_context(context)
        if context not in self.metadata["tokenizers"]:
            return None
        path = self._asset(self.metadata["tokenizers"][context]) / TOKEN_IDS
        if path.relative_to(self.root).as_posix() not in self.metadata["files"]:
            return None
        self.verify(path)
        try:  # mapping refuses a shape larger than the file instead of allocating it
            ids: npt.NDArray[Any] = np.array(np.lib.format.open_memmap(path, mode="r"))
        except Exception as error:  # the header is parsed as Python
            raise UsageError(f"{path}: cannot be read ({error}); build the bundle again") from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() < 1 << 31):
            raise UsageError(f"{path}: holds {ids.dtype} of shape {ids.shape}, not token ids; build the bundle again")
        return ids.astype(np.int64)

    def generation(self, context: str) -> GenerationSettings | None:
        """What a program that generates text needs; None for a model that reads no text, and in older bundles."""
        self._require_context(context)
        plain = self.metadata.get("generation", {}).get(context)
        return GenerationSettings.from_plain(plain) if plain is not None else None

    def cache(self, context: str) -> CacheBytes | None:
        """What a token takes in the cache; None for a model without a cache, and in older bundles."""
        self._require_context(context)
        plain = self.metadata.get("cache", {}).get(context)
        if plain is None:
            return None
        sizes = {name: require(plain[name], int, name) for name in ("bytes_per_token", "dense_bytes_per_token")}
        if min(sizes.values()) < 0:
            raise ValueError(f"cache of {context}: {sizes}")
        return CacheBytes(**sizes)

    @property
    def best(self) -> str:
        """The variant for the CPU that the build chose on its machine; cpu-fp32 if it did not search for one."""
        return str(self.metadata.get("best", EXACT))

    @property
    def bytes(self) -> int:
        """The bytes of all files except the reports."""
        return sum(p.stat().st_size for p in self.root.rglob("*") if p.is_file() and p.name not in REPORTS)

    def variants(self, context: str) -> tuple[Variant, ...]:
        """The engines of `context`; UsageError lists the contexts that exist."""
        self._require_context(context)
        own = [self._variant(context, context, name) for name in self.components[context]["variants"]]
        routed = self.components.get(ROUTER, {"variants": {}})["variants"]
        served = [name for name in routed if context in routed[name]["executor_info"]["cpcompile"]["contexts"]]
        return (*own, *(self._variant(context, ROUTER, name) for name in served))

    def variant(self, context: str, name: str) -> Variant:
        """One engine of `context`, "best" for the one that the build chose; UsageError lists those that exist."""
        variants = {variant.name: variant for variant in self.variants(context)}
        name = self.best if name == BEST else name
        if name not in tuple(variants):  # callers may give anything, such as a list
            raise UsageError(f"{self.root}: {context} has no variant {name!r}; it has {', '.join(sorted(variants))}")
        return variants[name]

    def verify(self, *paths: str | PathLike[str]) -> None:
        """Compare files, or all files of folders, with the digests in the manifest."""
        digests = self.metadata["files"]
        for path in map(Path, paths):
            if not path.is_relative_to(self.root):
                raise UsageError(f"{path}: lies outside of {self.root}; give a path that begins with it")
            relative = path.relative_to(self.root).as_posix()
            expected = {name for name in digests if name == relative or name.startswith(f"{relative}/")}
            if not expected:
                raise UsageError(f"{path}: is not listed in {self.root / MANIFEST}; build the bundle again")
            for name in sorted(expected):
                verify_file(inside(self.root, name), digests[name])

    def verify_all(self) -> None:
        """Check every file that the manifest lists, and what every engine refers to."""
        for name, digest in self.metadata["files"].items():
            verify_file(inside(self.root, name), digest)
        for context in self.contexts:
            for variant in self.variants(context):
                self._verify_references(variant)

    def verify_engine(self, variant: Variant) -> None:
        """Check the files that loading `variant` opens, its model and weights, and that it refers to no others."""
        self.verify(variant.model, *([variant.weights] if variant.weights else []))
        self._verify_references(variant)

    def _require_context(self, context: str) -> None:
        if context not in self.contexts:
            raise UsageError(f"{self.root}: has no context {context!r}; it has {', '.join(self.contexts)}")

    def _verify_references(self, variant: Variant) -> None:
        """Check that every external tensor lies within a file of its weights that the manifest lists."""
        if variant.plan:
            return  # a plan is one file
        folder = None if variant.weights is None else variant.weights.relative_to(self.root).as_posix()
        for reference in references_of(variant.model):
            name = f"{folder}/{reference.location}"
            if folder is None or name not in self.metadata["files"]:
                raise UsageError(
                    f"{variant.model}: a tensor lies in {reference.location!r}, which is not a file of its weights, "
                    "so it is refused; build the bundle again"
                )
            size = inside(self.root, name).stat().st_size
            if (end := reference.offset + (reference.length or 0)) > size:
                raise UsageError(
                    f"{variant.model}: a tensor needs the bytes up to {end:,} of {reference.location}, which has "
                    f"{size:,}; build the bundle again"
                )

    def _variant(self, context: str, component: str, name: str) -> Variant:
        body = self.components[component]["variants"][name]
        own, info = body["executor_info"]["cpcompile"], body["executor_info"]
        plan = PlanInfo.from_plain(info[PLAN]) if PLAN in info else None
        openvino = plan is None and own["runtime"] == OPENVINO
        executor = info[PLAN if plan else OPENVINO if openvino else "ort"]
        options = dict(executor.get("session_options", {}))
        weights = require(executor.get(WEIGHTS, ""), str, WEIGHTS) if openvino else options.pop(WEIGHTS_OPTION, None)
        folder = f"{component}/{body.get('variant_directory', name)}"
        contexts = require(own["contexts"], list, "contexts")
        return Variant(
            context=context,
            name=name,
            runtime=own["runtime"],
            precision=own["precision"],
            provider="" if plan or openvino else body["ep"],
            model=inside(self.root, f"{folder}/{require(executor['model_file'], str, 'model_file')}"),
            weights=self._asset(weights) if weights else None,
            session_options=options,
            provider_options=dict(executor.get("provider_options", {})),
            feeds={"context": contexts.index(context)} if contexts else {},
            bytes=own["bytes"],
            plan=plan,
        )

    def _asset(self, uri: str) -> Path:
        return inside(self.root, f"shared_assets/{uri.replace(':', '-')}")


def open_bundle(path: str | PathLike[str]) -> Bundle:
    """Open and check the manifest and the components of the bundle `path`."""
    path = as_path(path, "open_bundle")
    if not inside(path, MANIFEST).is_file():
        failed = path.with_name(f"{path.name}.failed")
        if not path.exists() and inside(failed, MANIFEST).is_file():
            raise UsageError(f"{path}: there is no such folder; a build whose verdict is fail wrote {failed}")
        kind = "there is no such folder" if not path.exists() else f"is not a bundle (no {MANIFEST} in it)"
        raise UsageError(f"{path}: {kind}; `cpcompile build model.pt -o model.cpc` makes one")
    manifest = read_json(path / MANIFEST)
    try:
        metadata = dict(manifest["additional_metadata"]["cpcompile"])
        digest = metadata.pop("manifest_digest")
        if metadata["version"] not in READABLE:
            raise UsageError(
                f"{path}: bundle version {metadata['version']!r}, this cpcompile reads "
                f"{' and '.join(map(str, READABLE))}; build it again"
            )
        if digest != manifest_digest(manifest):
            raise UsageError(f"{path / MANIFEST}: was changed or damaged after the build; build the bundle again")
        components = {}
        for name, folder in require(manifest["components"], dict, "components").items():
            require_name(name, "context")
            component = inside(path, f"{folder}/component.json")
            verify_file(component, metadata["files"][f"{folder}/component.json"])
            components[name] = read_json(component)
        bundle = Bundle(
            root=path,
            name=require(manifest["package_name"], str, "package_name"),
            contexts=tuple(name for name in components if name != ROUTER),
            metadata=metadata,
            components=components,
        )
        _require_readable(bundle)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path / MANIFEST}: is incomplete or malformed ({error}); build the bundle again") from error
    return bundle


def _require_readable(bundle: Bundle) -> None:
    """Check that everything read later has the form that `seal` writes; TypeError, KeyError or ValueError if not."""
    metadata = bundle.metadata
    require(metadata["shared_weights"], bool, "shared_weights")
    tokenizers = require(metadata["tokenizers"], dict, "tokenizers")
    for context in bundle.contexts if tokenizers else ():
        require(tokenizers[context], str, f"tokenizer of {context}")
    require(metadata["checkpoint"], str, "checkpoint")
    for name, digest in require(metadata["files"], dict, "files").items():
        require(digest, str, f"the digest of {name}")
    require(metadata.get("generation", {}), dict, "generation")
    require(metadata.get("cache", {}), dict, "cache")
    require(metadata.get("best", EXACT), str, "best")
    request = require(metadata.get("request", {}), dict, "request")
    require(request.get("calibration", ""), str, "calibration")
    for context in bundle.contexts:
        bundle.generation(context)
        bundle.cache(context)
        parameters = require(metadata["parameters"], dict, "parameters")[context]
        for key in ("total", "kept", "removed"):
            if require(parameters[key], int, f"parameters of {context}") < (key == "total"):
                raise ValueError(f"parameters of {context}: {key}")
        require(parameters["removed_experts"], dict, f"removed experts of {context}")
        for kind, removed in require(parameters["removed_by_kind"], dict, "removed_by_kind").items():
            require(removed, int, f"removed {kind} of {context}")
        if not require(bundle.components[context]["variants"], dict, f"variants of {context}"):
            raise ValueError(f"{context} has no variants")
        for variant in bundle.variants(context):
            require_name(variant.name, f"variant of {context}")
            if require(variant.bytes, int, f"bytes of {variant.name}") < 0:
                raise ValueError(f"bytes of {variant.name}: {variant.bytes}")
            suffix = ".plan" if variant.plan else ".onnx"
            if variant.model.suffix != suffix:
                raise ValueError(f"model_file of {variant.name}: {variant.model.name!r} is not named {suffix}")
            for field in (variant.name, variant.runtime, variant.precision, variant.provider):
                if not require(field, str, f"variant of {context}").isprintable():
                    raise ValueError(f"variant of {context}: {field!r}")
            for key, value in variant.session_options.items():
                require(value, str, f"session option {key}")
                if key not in SESSION_OPTIONS:
                    raise ValueError(f"session option {key!r}, which a bundle may not set")
            for key, value in variant.provider_options.items():
                require(value, str, f"provider option {key}")
                if key not in PROVIDER_OPTIONS.get(variant.provider, ()):
                    raise ValueError(f"option {key!r} of {variant.provider}, which a bundle may not set")
