"""The bundle `model.cpc/`: an ONNX Runtime model package (schema 1.0), components = contexts.

    manifest.json                       components, and under additional_metadata.cpcompile the digest of every file
    <context>/component.json            variants = runtime + precision
    <context>/<variant>/model.onnx      graph; its weights are slices of one shared file
    <context>/<variant>/engine.plan     of TensorRT, with its own weights; executor_info.tensorrt says what runs it
    router/cpu-fp32-merged/model.onnx   all contexts in one graph, which has the context as an input
    shared_assets/sha256-<hex>/         weights.bin; tokenizer.json, and token_ids.npy where it was trimmed
    report.json                         what validation found (outside of the digests)

Reading needs neither torch nor onnxruntime. Everything is checked before it is used: the
manifest against its own digest, each file against the manifest, each path against the root, and what an engine makes
its runtime open against both. Digests show damage, not who wrote the bundle: one that was sealed anew can ask for any
amount of time and memory, but for no file outside, no library and no output. Nobody may change it while it is in use.
The format: microsoft/onnxruntime, model_package/README.md.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from cpcompile.bundle.artifact import Artifact
from cpcompile.core.config import CONTEXT_NAME
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.files.external_data import references_of
from cpcompile.files.whole_files import NO_ROOM, file_digest, remove_leftovers, temporary_path
from cpcompile.targets.requests import EngineInfo
from cpcompile.text.vocabulary import TrimmedVocabulary

if TYPE_CHECKING:
    import onnx_ir as ir

T = TypeVar("T")

BUNDLE_VERSION = 3
MANIFEST = "manifest.json"
TOKEN_IDS = "token_ids.npy"
"""Beside the tokenizer.json of a context whose vocabulary was trimmed: see `Bundle.token_ids`."""
ROUTER = "router"
"""The component of engines that serve several contexts."""
REPORTS = ("report.json", "report.html")
PLAN = "tensorrt"
"""The executor of plans, as `executor_info` calls it."""
WEIGHTS_OPTION = "session.model_external_initializers_file_folder_path"
SESSION_OPTIONS = frozenset({"session.disable_prepacking"})
"""What a bundle may set for ONNX Runtime besides its weights: others load libraries and write files."""
PROVIDER_OPTIONS: Mapping[str, frozenset[str]] = {
    "CUDAExecutionProvider": frozenset({"use_tf32", "prefer_nhwc", "enable_cuda_graph", "cudnn_conv_algo_search"}),
    "TensorrtExecutionProvider": frozenset(
        {"trt_fp16_enable", "trt_bf16_enable", "trt_cuda_graph_enable", "trt_builder_optimization_level"}
        | {f"trt_profile_{which}_shapes" for which in ("min", "opt", "max")}
    ),
    "NvTensorRTRTXExecutionProvider": frozenset(
        {"enable_cuda_graph", "nv_multi_profile_enable"}
        | {f"nv_profile_{which}_shapes" for which in ("min", "opt", "max")}
    ),
}
"""What a bundle may set for an execution provider, for the same reason. Devices and caches are the machine's."""
MAX_JSON = 1 << 26
"""Bytes of a manifest or component: one of a thousand contexts has less than a megabyte."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One engine of one context in a bundle."""

    context: str
    name: str
    runtime: str
    precision: str
    provider: str
    """Execution provider of ONNX Runtime; empty for a plan of TensorRT."""
    model: Path
    weights: Path | None
    """Folder of the shared weights."""
    session_options: Mapping[str, str]
    provider_options: Mapping[str, str]
    feeds: Mapping[str, int]
    """Inputs that choose the context, of an engine that serves several."""
    bytes: int
    """Of its own files and of its share of the weights."""
    engine: EngineInfo | None = None
    """Of a plan of TensorRT: what it was built by and for."""

    def graph(self) -> ir.Model:
        """Its graph, whose weights stay in their file; the files have been verified. UsageError for a plan."""
        from cpcompile.files.onnx_file import load_onnx  # an application that runs engines does without onnx_ir

        if self.engine is not None:
            raise UsageError(f"{self.model}: is a plan of {self.runtime}, no ONNX graph; choose another variant")
        return load_onnx(self.model, data=self.weights)

    def standalone(self) -> ir.Model:
        """Its graph with all weights inside."""
        import onnx_ir as ir

        return ir.external_data.load_to_model(self.graph())


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle: the manifest is checked, the files are checked by `verify` before they are loaded."""

    root: Path
    name: str
    contexts: tuple[str, ...]
    metadata: Mapping[str, Any]
    """What the build recorded: context indices, parameter accounting, source checkpoint, digests."""
    components: Mapping[str, Mapping[str, Any]]

    def tokenizer(self, context: str) -> Path:
        """The tokenizer.json of `context`, verified; UsageError if the bundle's model reads no text."""
        if context not in self.metadata["tokenizers"]:
            raise UsageError(f"{self.root}: has no tokenizer of {context!r}; it was built from a program")
        path = self._asset(self.metadata["tokenizers"][context]) / "tokenizer.json"
        self.verify(path)
        return path

    def token_ids(self, context: str) -> npt.NDArray[np.int64] | None:
        """The id that each token of `context` has in the whole vocabulary; None where the context has it whole."""
        if context not in self.metadata["tokenizers"]:
            return None
        path = self._asset(self.metadata["tokenizers"][context]) / TOKEN_IDS
        if path.relative_to(self.root).as_posix() not in self.metadata["files"]:
            return None
        self.verify(path)
        try:  # mapped: a shape of more than the file holds is refused, not allocated
            ids: npt.NDArray[Any] = np.array(np.lib.format.open_memmap(path, mode="r"))
        except Exception as error:  # the header is parsed as Python
            raise UsageError(f"{path}: cannot be read ({error}); build the bundle again") from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() < 1 << 31):
            raise UsageError(f"{path}: holds {ids.dtype} of shape {ids.shape}, no token ids; build the bundle again")
        return ids.astype(np.int64)

    def trimmed_vocabularies(self) -> dict[str, TrimmedVocabulary]:
        """By context, of those that have a vocabulary of their own."""
        return {
            context: TrimmedVocabulary(self.tokenizer(context).read_text(encoding="utf-8"), ids)
            for context in self.contexts
            if (ids := self.token_ids(context)) is not None
        }

    @property
    def bytes(self) -> int:
        """Of all files but the reports."""
        return sum(p.stat().st_size for p in self.root.rglob("*") if p.is_file() and p.name not in REPORTS)

    def variants(self, context: str) -> tuple[Variant, ...]:
        """The engines of `context`; UsageError lists the contexts there are."""
        if context not in self.contexts:
            raise UsageError(f"{self.root}: has no context {context!r}; it has {', '.join(self.contexts)}")
        own = [self._variant(context, context, name) for name in self.components[context]["variants"]]
        routed = self.components.get(ROUTER, {"variants": {}})["variants"]
        served = [name for name in routed if context in routed[name]["executor_info"]["cpcompile"]["contexts"]]
        return (*own, *(self._variant(context, ROUTER, name) for name in served))

    def variant(self, context: str, name: str) -> Variant:
        """One engine; UsageError lists what there is."""
        variants = {variant.name: variant for variant in self.variants(context)}
        if name not in variants:
            raise UsageError(f"{self.root}: {context} has no variant {name!r}; it has {', '.join(variants)}")
        return variants[name]

    def verify(self, *paths: Path) -> None:
        """Compare files, or all files of folders, with the digests in the manifest."""
        digests = self.metadata["files"]
        for path in paths:
            relative = path.relative_to(self.root).as_posix()
            expected = {name for name in digests if name == relative or name.startswith(f"{relative}/")}
            if not expected:
                raise UsageError(f"{path}: is not listed in {self.root / MANIFEST}; build the bundle again")
            for name in sorted(expected):
                _verify_file(_inside(self.root, name), digests[name])

    def verify_all(self) -> None:
        """Check every file that the manifest lists, and what every engine refers to."""
        for name, digest in self.metadata["files"].items():
            _verify_file(_inside(self.root, name), digest)
        for context in self.contexts:
            for variant in self.variants(context):
                self._verify_references(variant)

    def verify_engine(self, variant: Variant) -> None:
        """Check all files that loading `variant` opens: its model, its weights, and that it refers to no others."""
        self.verify(variant.model, *([variant.weights] if variant.weights else []))
        self._verify_references(variant)

    def _verify_references(self, variant: Variant) -> None:
        """Every tensor outside of the model lies in a file of its weights that the manifest lists, and within it."""
        if variant.engine is not None:
            return  # a plan is one file
        folder = None if variant.weights is None else variant.weights.relative_to(self.root).as_posix()
        for reference in references_of(variant.model):
            name = f"{folder}/{reference.location}"
            if folder is None or name not in self.metadata["files"]:
                raise UsageError(
                    f"{variant.model}: a tensor lies in {reference.location!r}, which is no file of its weights; "
                    "it is refused. Build the bundle again"
                )
            there = _inside(self.root, name).stat().st_size
            if (end := reference.offset + (reference.length or 0)) > there:
                raise UsageError(
                    f"{variant.model}: a tensor needs the bytes up to {end:,} of {reference.location}, which has "
                    f"{there:,}; build the bundle again"
                )

    def _variant(self, context: str, component: str, name: str) -> Variant:
        body = self.components[component]["variants"][name]
        own, info = body["executor_info"]["cpcompile"], body["executor_info"]
        engine = EngineInfo.from_plain(info[PLAN]) if PLAN in info else None
        executor = info[PLAN] if engine is not None else info["ort"]
        options = dict(executor.get("session_options", {}))
        weights = options.pop(WEIGHTS_OPTION, None)
        folder = f"{component}/{body.get('variant_directory', name)}"
        contexts = _require(own["contexts"], list, "contexts")
        return Variant(
            context=context,
            name=name,
            runtime=own["runtime"],
            precision=own["precision"],
            provider=body["ep"] if engine is None else "",
            model=_inside(self.root, f"{folder}/{_require(executor['model_file'], str, 'model_file')}"),
            weights=self._asset(weights) if weights else None,
            session_options=options,
            provider_options=dict(executor.get("provider_options", {})),
            feeds={"context": contexts.index(context)} if contexts else {},
            bytes=own["bytes"],
            engine=engine,
        )

    def _asset(self, uri: str) -> Path:
        return _inside(self.root, f"shared_assets/{uri.replace(':', '-')}")


def open_bundle(path: Path) -> Bundle:
    """Open and check the manifest and the components of the bundle `path`."""
    if not _inside(path, MANIFEST).is_file():
        kind = "there is no such folder" if not path.exists() else f"is not a bundle (no {MANIFEST} in it)"
        raise UsageError(f"{path}: {kind}; `cpcompile build model.pt -o model.cpc` makes one")
    manifest = _read_json(path / MANIFEST)
    try:
        metadata = dict(manifest["additional_metadata"]["cpcompile"])
        digest = metadata.pop("manifest_digest")
        if metadata["version"] != BUNDLE_VERSION:
            raise UsageError(
                f"{path}: bundle version {metadata['version']!r}, this cpcompile reads {BUNDLE_VERSION}; build it again"
            )
        if digest != _manifest_digest(manifest):
            raise UsageError(f"{path / MANIFEST}: was changed or damaged after the build; build the bundle again")
        components = {}
        for name, folder in _require(manifest["components"], dict, "components").items():
            _require_name(name, "context")
            component = _inside(path, f"{folder}/component.json")
            _verify_file(component, metadata["files"][f"{folder}/component.json"])
            components[name] = _read_json(component)
        bundle = Bundle(
            root=path,
            name=_require(manifest["package_name"], str, "package_name"),
            contexts=tuple(name for name in components if name != ROUTER),
            metadata=metadata,
            components=components,
        )
        _require_readable(bundle)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path / MANIFEST}: lacks or garbles {error}; build the bundle again") from error
    return bundle


def _require_readable(bundle: Bundle) -> None:
    """Everything that is read later has the form that `seal` gives it; TypeError, KeyError or ValueError otherwise."""
    metadata = bundle.metadata
    _require(metadata["shared_weights"], bool, "shared_weights")
    tokenizers = _require(metadata["tokenizers"], dict, "tokenizers")
    for context in bundle.contexts if tokenizers else ():
        _require(tokenizers[context], str, f"tokenizer of {context}")
    _require(metadata["checkpoint"], str, "checkpoint")
    for name, digest in _require(metadata["files"], dict, "files").items():
        _require(digest, str, f"the digest of {name}")
    for context in bundle.contexts:
        parameters = _require(metadata["parameters"], dict, "parameters")[context]
        for key in ("total", "kept", "removed"):
            if _require(parameters[key], int, f"parameters of {context}") < (key == "total"):
                raise ValueError(f"parameters of {context}: {key}")
        _require(parameters["removed_experts"], dict, f"removed experts of {context}")
        for kind, removed in _require(parameters["removed_by_kind"], dict, "removed_by_kind").items():
            _require(removed, int, f"removed {kind} of {context}")
        if not _require(bundle.components[context]["variants"], dict, f"variants of {context}"):
            raise ValueError(f"variants of {context}: there are none")
        for variant in bundle.variants(context):
            _require_name(variant.name, f"variant of {context}")
            if _require(variant.bytes, int, f"bytes of {variant.name}") < 0:
                raise ValueError(f"bytes of {variant.name}: {variant.bytes}")
            suffix = ".onnx" if variant.engine is None else ".plan"
            if variant.model.suffix != suffix:
                raise ValueError(f"model_file of {variant.name}: {variant.model.name!r} is not named {suffix}")
            for field in (variant.name, variant.runtime, variant.precision, variant.provider):
                if not _require(field, str, f"variant of {context}").isprintable():
                    raise ValueError(f"variant of {context}: {field!r}")
            for key, value in variant.session_options.items():
                _require(value, str, f"session option {key}")
                if key not in SESSION_OPTIONS:
                    raise ValueError(f"session option {key!r}, which a bundle may not set")
            for key, value in variant.provider_options.items():
                _require(value, str, f"provider option {key}")
                if key not in PROVIDER_OPTIONS.get(variant.provider, ()):
                    raise ValueError(f"option {key!r} of {variant.provider}, which a bundle may not set")


def _require(value: Any, kind: type[T], what: str) -> T:
    if type(value) is not kind:
        raise TypeError(f"{what} (a {type(value).__name__} instead of {kind.__name__})")
    return value


def _require_name(name: str, what: str) -> None:
    if not CONTEXT_NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r} is no name")


class BundleWriter:
    """Collects a bundle in a temporary folder beside `target` and renames it when complete.

    `seal` makes it a bundle, `commit` moves it; one that failed its validation to `<target>.failed`. Until then the
    old bundle is untouched; leaving the block without `commit` removes the new one.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))
        if not self.target.name:
            raise UsageError(f"{target}: cannot be a bundle; choose another output, such as model.cpc")
        self.failed = self.target.with_name(f"{self.target.name}.failed")
        for path in (self.target, self.failed):
            _require_replaceable(path)
        self._components: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> BundleWriter:
        self.root = temporary_path(self.target)
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.target)
            self.root.mkdir()
        except OSError as error:
            raise CpcompileError(
                f"{self.target}: cannot be written ({error.strerror}); choose another output"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise CpcompileError(
                f"{self.target}: the disk is full; free space or choose another output (the previous bundle is intact)"
            ) from error

    def folder(self, context: str, variant: str) -> Path:
        """Where the files of a variant go."""
        folder = self.root / context / variant
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def stage(self, name: str) -> Path:
        """An empty folder in which an asset can be prepared."""
        folder = self.root / f".{name}"
        folder.mkdir()
        return folder

    def add_asset(self, folder: Path) -> str:
        """Move `folder` (inside of this bundle) to its content address and return its URI."""
        uri = asset_uri(folder)
        target = self.asset(uri)
        target.parent.mkdir(exist_ok=True)
        if target.exists():  # of another context, byte by byte the same
            shutil.rmtree(folder)
        else:
            folder.rename(target)
        return uri

    def asset(self, uri: str) -> Path:
        """The folder of a shared asset."""
        return self.root / "shared_assets" / uri.replace(":", "-")

    def add_variant(self, context: str, artifact: Artifact, *, weights: str | None) -> None:
        """Enter the engine `artifact` of `context`, whose files lie in `folder(context, artifact.variant)`."""
        folder = self.folder(context, artifact.variant)
        own = sum((folder / name).stat().st_size for name in artifact.files)
        options = dict(artifact.session_options) | ({WEIGHTS_OPTION: weights} if weights else {})
        component = self._components.setdefault(context, {"component_name": context, "variants": {}})
        executor: dict[str, Any] = {"model_file": artifact.model_file}
        if artifact.engine is None:
            provided = {"ep": artifact.provider, "device": artifact.device}
            executor |= {"session_options": options}
            executor |= {"provider_options": dict(artifact.provider_options)} if artifact.provider_options else {}
            executors: dict[str, Any] = {"ort": executor}
        else:
            provided = {}  # without a provider, ONNX Runtime passes the variant over
            executors = {PLAN: executor | artifact.engine.to_plain()}
        component["variants"][artifact.variant] = {
            "variant_directory": artifact.variant,
            **provided,
            "executor_info": {
                **executors,
                "cpcompile": {
                    "runtime": artifact.runtime,
                    "precision": artifact.precision,
                    "contexts": list(artifact.contexts),
                    "bytes": own + artifact.shared_bytes,
                },
            },
        }

    def seal(self, *, name: str, metadata: Mapping[str, Any]) -> Bundle:
        """Write component and manifest files; the bundle can be opened where it lies."""
        for context, component in self._components.items():
            _write_json(self.root / context / "component.json", component)
        files = {
            path.relative_to(self.root).as_posix(): file_digest(path)
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and path.name not in REPORTS
        }
        manifest: dict[str, Any] = {
            "schema_version": "1.0",
            "package_name": name,
            "layout": "portable",
            "components": {context: context for context in self._components},
            "additional_metadata": {"cpcompile": {"version": BUNDLE_VERSION, **metadata, "files": files}},
        }
        manifest["additional_metadata"]["cpcompile"]["manifest_digest"] = _manifest_digest(manifest)
        _write_json(self.root / MANIFEST, manifest)
        return open_bundle(self.root)

    def commit(self, *, failed: bool = False) -> Path:
        """Put the sealed bundle in its place; returns where it is."""
        target = self.failed if failed else self.target
        _put_in_place(self.root, target)
        return target


def asset_uri(folder: Path) -> str:
    """The canonical URI of a shared asset: the digest over the digests and names of its files."""
    lines = [
        f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix())
        if path.is_file()
    ]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _inside(root: Path, name: str) -> Path:
    """`root/name`, refused if it leaves `root` by its text or through a link."""
    pure = PurePosixPath(name)
    path = root / pure
    try:
        outside = not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a character no path has
        raise UsageError(f"{root}: {name[:100]!r} is no path; build the bundle again") from error
    if pure.is_absolute() or ".." in pure.parts or outside:
        raise UsageError(f"{root}: the path {name!r} leaves the bundle; it is refused. Build the bundle again")
    return path


def _verify_file(path: Path, digest: str) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, a device has no end
            raise UsageError(f"{path}: is not a regular file; build the bundle again or copy it whole")
        actual = file_digest(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: is missing from the bundle; build it again or copy it whole") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    if actual != digest:
        raise UsageError(
            f"{path}: differs from what was built (digest mismatch); build the bundle again or copy it whole"
        )


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of the manifest without this digest itself."""
    plain = json.loads(json.dumps(manifest))
    plain["additional_metadata"]["cpcompile"].pop("manifest_digest", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise ValueError(f"{size:,} bytes, more than {MAX_JSON:,}")
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}); build the bundle again") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A parser may take the first of two equal keys, another the last: there must be one."""
    if len(content := dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")
    return content


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _require_replaceable(target: Path) -> None:
    """Nothing is at `target`, or an empty folder, or a bundle of any version with nothing else in its folder."""
    if not os.path.lexists(target):
        return
    refusal = f"{target}: exists and is not a bundle; choose another output or remove it"
    if not target.is_dir():
        raise UsageError(refusal)
    for report in REPORTS:
        remove_leftovers(target / report)
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink() or path.is_file()}
    if not there and not any(target.iterdir()):
        return
    if MANIFEST not in there:
        raise UsageError(refusal)
    try:
        ours = set(_read_json(target / MANIFEST)["additional_metadata"]["cpcompile"]["files"])
    except (UsageError, KeyError, TypeError) as error:
        raise UsageError(refusal) from error
    foreign = sorted(there - ours - {MANIFEST, *REPORTS})
    if foreign:
        raise UsageError(
            f"{target}: {foreign[0]} lies there and is no part of the bundle; take it away, or choose another output"
        )


def _put_in_place(folder: Path, target: Path) -> None:
    """Make `folder` the `target`; where the system can, old and new change places in one step."""
    if not target.exists():
        folder.rename(target)
        return
    if _exchange(folder, target):
        shutil.rmtree(folder, ignore_errors=True)
        return
    old = folder.with_name(folder.name + ".old")
    target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Linux: renameat2 with RENAME_EXCHANGE."""
    with suppress(OSError, AttributeError):
        at_cwd, rename_exchange = -100, 2
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0)
    return False
