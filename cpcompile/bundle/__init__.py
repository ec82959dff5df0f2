"""The bundle `model.cpc/`: written whole, and checked before it is used; without torch and onnxruntime."""

from cpcompile.bundle.reader import Bundle, Variant, open_bundle

__all__ = ["Bundle", "Variant", "open_bundle"]
