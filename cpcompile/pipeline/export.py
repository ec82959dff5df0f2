"""`cpcompile export`: one self-contained ONNX file of one engine."""

from __future__ import annotations

from pathlib import Path

from cpcompile.bundle.reader import open_bundle
from cpcompile.core.errors import UsageError
from cpcompile.files.whole_files import require_file_path, whole_file


def export_standalone(path: Path, context: str, out: Path, *, variant: str) -> None:
    """`cpcompile export`: one self-contained ONNX file of one engine of the bundle `path`."""
    bundle = open_bundle(path)
    if require_file_path(out, ".onnx").is_relative_to(bundle.root.resolve()):
        raise UsageError(f"{out}: lies in the bundle; choose another --out")
    chosen = bundle.variant(context, variant)
    bundle.verify_engine(chosen)
    with whole_file(out) as temporary:
        chosen.save_standalone(temporary)
