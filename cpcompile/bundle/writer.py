"""Write a bundle into a temporary folder, then put it in place in one step."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from cpcompile.bundle.artifact import Artifact
from cpcompile.bundle.manifest import BUNDLE_VERSION, MANIFEST, REPORTS, manifest_digest, read_json
from cpcompile.bundle.reader import PLAN, WEIGHTS, WEIGHTS_OPTION, Bundle, open_bundle
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.files.whole_files import NO_ROOM, file_digest, remove_leftovers, unfinished
from cpcompile.targets.requests import OPENVINO


class BundleWriter:
    """Collects a bundle in a temporary folder beside `target` and renames it when it is complete.

    `seal` makes it a bundle and `commit` moves it into place, or to `<target>.failed` if its validation failed. Until
    then the old bundle is untouched; leaving the `with` block without `commit` removes the new one.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))
        if not self.target.name:
            raise UsageError(f"{target}: cannot be a bundle; choose another output, such as model.cpc")
        self.failed = self.target.with_name(f"{self.target.name}.failed")
        remove_leftovers(self.target.parent)
        for path in (self.target, self.failed):
            _require_replaceable(path)
        self._components: dict[str, dict[str, Any]] = {}
        self._unfinished = unfinished(self.target, folder=True)

    def __enter__(self) -> BundleWriter:
        try:
            self.root = self._unfinished.__enter__()
        except OSError as error:
            raise CpcompileError(
                f"{self.target}: cannot be written ({error.strerror}); choose another output"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unfinished.__exit__(None, None, None)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise CpcompileError(
                f"{self.target}: the disk is full; free space or choose another output (the previous bundle is intact)"
            ) from error

    def folder(self, context: str, variant: str) -> Path:
        """The folder for the files of a variant, which is created."""
        folder = self.root / context / variant
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def stage(self, name: str) -> Path:
        """Create an empty folder in which an asset can be prepared."""
        folder = self.root / f".{name}"
        folder.mkdir()
        return folder

    def add_asset(self, folder: Path) -> str:
        """Move `folder`, which is inside this bundle, to its content address and return its URI."""
        uri = asset_uri(folder)
        target = self.asset(uri)
        target.parent.mkdir(exist_ok=True)
        if target.exists():  # the identical asset of another context
            shutil.rmtree(folder)
        else:
            folder.rename(target)
        return uri

    def asset(self, uri: str) -> Path:
        """The folder of a shared asset."""
        return self.root / "shared_assets" / uri.replace(":", "-")

    def add_variant(self, context: str, artifact: Artifact, *, weights: str | None) -> None:
        """Record the engine `artifact` of `context`; its files are in `folder(context, artifact.variant)`."""
        folder = self.folder(context, artifact.variant)
        own = sum((folder / name).stat().st_size for name in artifact.files)
        options = dict(artifact.session_options) | ({WEIGHTS_OPTION: weights} if weights else {})
        component = self._components.setdefault(context, {"component_name": context, "variants": {}})
        executor: dict[str, Any] = {"model_file": artifact.model_file}
        provided: dict[str, str] = {}  # ONNX Runtime skips a variant without a provider
        if artifact.plan:
            executors: dict[str, Any] = {PLAN: executor | artifact.plan.to_plain()}
        elif artifact.runtime == OPENVINO:
            executors = {OPENVINO: executor | ({WEIGHTS: weights} if weights else {})}
        else:
            provided = {"ep": artifact.provider, "device": artifact.device}
            executor |= {"session_options": options}
            executor |= {"provider_options": dict(artifact.provider_options)} if artifact.provider_options else {}
            executors = {"ort": executor}
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
        """Write the component and manifest files and open the bundle, still in the temporary folder."""
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
        manifest["additional_metadata"]["cpcompile"]["manifest_digest"] = manifest_digest(manifest)
        _write_json(self.root / MANIFEST, manifest)
        return open_bundle(self.root)

    def commit(self, *, failed: bool = False) -> Path:
        """Move the sealed bundle into place and return its path."""
        target = self.failed if failed else self.target
        _put_in_place(self.root, target)
        return target


def asset_uri(folder: Path) -> str:
    """The canonical URI of a shared asset: a digest of the digests and names of its files."""
    lines = [
        f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix())
        if path.is_file()
    ]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _require_replaceable(target: Path) -> None:
    """UsageError unless `target` is missing, an empty folder, or a bundle of any version without foreign files."""
    if not os.path.lexists(target):
        return
    refusal = f"{target}: exists and is not a bundle; choose another output or remove it"
    if not target.is_dir():
        raise UsageError(refusal)
    remove_leftovers(target)  # of reports
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink() or path.is_file()}
    if not there and not any(target.iterdir()):
        return
    if MANIFEST not in there:
        raise UsageError(refusal)
    try:
        ours = set(read_json(target / MANIFEST)["additional_metadata"]["cpcompile"]["files"])
    except (UsageError, KeyError, TypeError) as error:
        raise UsageError(refusal) from error
    foreign = sorted(there - ours - {MANIFEST, *REPORTS})
    if foreign:
        raise UsageError(f"{target}: {foreign[0]} is not part of the bundle; move it away or choose another output")


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`, exchanging it with an old one in one step where the system can."""
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
    """Exchange two paths atomically (Linux: renameat2 with RENAME_EXCHANGE); False where that is not possible."""
    with suppress(OSError, AttributeError):
        at_cwd, rename_exchange = -100, 2
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0)
    return False
