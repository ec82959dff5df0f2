"""The packages that cpcompile needs: those that run engines, and those of the extra `build`.

Source: pyproject.toml, [project] and [project.optional-dependencies].
"""

from __future__ import annotations

RUNTIME = ("numpy", "click", "rich", "tokenizers")
"""What every installation brings."""
BUILD = ("torch", "onnx", "onnx-ir", "onnxscript", "jinja2", "markupsafe", "matplotlib", "jsonschema")
"""What the extra `build` installs."""
EXTRAS = {name.replace("-", "_"): "build" for name in BUILD} | {"onnxruntime": "cpu"}
"""Module -> the extra that installs it."""


def missing_extra(error: ImportError, what: str) -> str | None:
    """The sentence that `what` needs an extra; None if `error` is not the absence of a module that one installs."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in EXTRAS:
        return None
    return f"{what} needs {error.name}: pip install 'cpcompile[{EXTRAS[error.name]}]'"
