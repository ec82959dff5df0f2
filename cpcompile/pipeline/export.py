"""`cpcompile export`: one self-contained ONNX file of one engine."""

from __future__ import annotations

from pathlib import Path

from cpcompile.bundle.reader import Bundle, Variant, open_bundle
from cpcompile.core.errors import UsageError
from cpcompile.files.whole_files import require_file_path, whole_file


def export_standalone(path: Path, context: str, out: Path, *, variant: str) -> Variant:
    """`cpcompile export`: one self-contained ONNX file of one engine of the bundle `path`; returns the engine."""
    bundle = open_bundle(path)
    if require_file_path(out, ".onnx").is_relative_to(bundle.root.resolve()):
        raise UsageError(f"{out}: lies in the bundle; choose another --out")
    chosen = exported_variant(bundle, context, variant)
    with whole_file(out) as temporary:
        chosen.save_standalone(temporary)
    return chosen


def exported_variant(bundle: Bundle, context: str, name: str) -> Variant:
    """The verified engine `name` of `context`; UsageError for one that serves several contexts."""
    chosen = bundle.variant(context, name)
    if chosen.feeds:
        raise UsageError(
            f"{chosen.model}: computes {context} only with an input that selects it, which other programs do not know; "
            "export the engine of the context alone, such as --variant cpu-fp32"
        )
    bundle.verify_engine(chosen)
    return chosen
