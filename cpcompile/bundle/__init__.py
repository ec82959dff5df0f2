"""The bundle `model.cpc/`: written whole, checked before it is used, and read without torch or onnxruntime."""

from cpcompile.bundle.reader import Bundle, Variant, open_bundle
from cpcompile.core.generation import GenerationSettings

__all__ = ["Bundle", "GenerationSettings", "Variant", "open_bundle"]
