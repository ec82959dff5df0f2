"""The identity of the program that compiles: its own code, and the libraries that it calls."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

LIBRARIES = (
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "tokenizers",
    "torch",
    "transformers",
)
"""Distributions that have a part in engines or in what is measured of them."""


@cache
def program_digest() -> str:
    """A digest of the code of cpcompile and of the versions of LIBRARIES; none of them is imported."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):  # three of them are links in a checkout
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    for name in LIBRARIES:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()
