"""The packages that cpcompile needs: those that run engines, and those of the extra `build`.

Source: pyproject.toml, [project] and [project.optional-dependencies].
"""

from __future__ import annotations

RUNTIME = ("numpy", "click", "rich", "tokenizers")
"""What every installation brings."""
BUILD = ("torch", "onnx", "onnx-ir", "onnxscript", "jinja2", "matplotlib", "jsonschema")
"""What the extra `build` installs."""
