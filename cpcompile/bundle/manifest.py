"""The manifest of a bundle: what may stand in it, and how its files are checked before they are used."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from cpcompile.core.config import CONTEXT_NAME
from cpcompile.core.errors import UsageError
from cpcompile.files.whole_files import file_digest

T = TypeVar("T")
BUNDLE_VERSION = 3
MANIFEST = "manifest.json"
REPORTS = ("report.json", "report.html")
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


def require(value: Any, kind: type[T], what: str) -> T:
    """`value`, which is exactly of that type; TypeError says `what` it is otherwise."""
    if type(value) is not kind:
        raise TypeError(f"{what} (a {type(value).__name__} instead of {kind.__name__})")
    return value


def require_name(name: str, what: str) -> None:
    """ValueError if `name` cannot be the name of a context or variant."""
    if not CONTEXT_NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r} is no name")


def inside(root: Path, name: str) -> Path:
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


def verify_file(path: Path, digest: str) -> None:
    """UsageError if the file `path` is missing or does not have that SHA-256."""
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


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of the manifest without this digest itself."""
    plain = json.loads(json.dumps(manifest))
    plain["additional_metadata"]["cpcompile"].pop("manifest_digest", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The JSON in `path`, which is small, repeats no key and has finite numbers; UsageError says what is wrong."""
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
