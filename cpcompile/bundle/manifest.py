"""The manifest of a bundle: what it may contain, and the checks of the files that it lists."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from cpcompile.core.config import CONTEXT_NAME
from cpcompile.core.errors import UsageError
from cpcompile.files.pointers import require_fetched
from cpcompile.files.whole_files import file_digest

T = TypeVar("T")
BUNDLE_VERSION = 4
READABLE = (3, 4)
"""Bundles of version 3 have graphs without a cache, and do not record what ends a text."""
MANIFEST = "manifest.json"
REPORTS = ("report.json", "report.html")
SESSION_OPTIONS = frozenset({"session.disable_prepacking", "session.x64quantprecision"})
"""Session options that a bundle may set besides its weights; others load libraries or write files."""
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
"""Provider options that a bundle may set, for the same reason; devices and caches belong to the machine."""
MAX_JSON = 1 << 26
"""The largest manifest or component in bytes; a thousand contexts need less than a megabyte."""


def require(value: Any, kind: type[T], what: str) -> T:
    """Return `value` if its type is exactly `kind`; TypeError names `what` otherwise."""
    if type(value) is not kind:
        raise TypeError(f"{what} (a {type(value).__name__} instead of {kind.__name__})")
    return value


def require_name(name: str, what: str) -> None:
    """ValueError unless `name` can be the name of a context or variant."""
    if not CONTEXT_NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r} is not a valid name")


def inside(root: Path, name: str) -> Path:
    """`root/name`; UsageError if it leaves `root`, by its text or through a link."""
    pure = PurePosixPath(name)
    path = root / pure
    try:
        outside = not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, an invalid character
        raise UsageError(f"{root}: {name[:100]!r} is not a valid path; build the bundle again") from error
    if pure.is_absolute() or ".." in pure.parts or outside:
        raise UsageError(f"{root}: the path {name!r} leaves the bundle, so it is refused; build the bundle again")
    return path


def verify_file(path: Path, digest: str) -> None:
    """UsageError if the file `path` is missing or does not have that SHA-256."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe could block, a device may be endless
            raise UsageError(f"{path}: is not a regular file; build the bundle again or copy it whole")
        actual = file_digest(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: is missing from the bundle; build it again or copy it whole") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    if actual != digest:
        require_fetched(path)
        raise UsageError(
            f"{path}: differs from what was built (digest mismatch); build the bundle again or copy it whole"
        )


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The digest of the manifest, computed without this digest."""
    plain = json.loads(json.dumps(manifest))
    plain["additional_metadata"]["cpcompile"].pop("manifest_digest", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The JSON in `path`; UsageError unless it is small, repeats no key and has only finite numbers."""
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise ValueError(f"{size:,} bytes, more than {MAX_JSON:,}")
        require_fetched(path)
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}); build the bundle again") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse repeated keys: one parser may take the first, another the last."""
    if len(content := dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not valid JSON")
