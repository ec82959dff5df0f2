"""The bundle `model.cpc/`: written whole, checked before it is used, and read without torch or onnxruntime."""

from cpcompile.bundle.reader import Bundle, Variant, open_bundle

__all__ = ["Bundle", "Variant", "open_bundle"]
