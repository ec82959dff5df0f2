"""Settings from a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from cpcompile.core.errors import UsageError
from cpcompile.files.whole_files import read_text

TABLES = ("model", "train", "validate", "check")
"""The tables of a TOML file; each command reads those that it uses."""
_TABLE_NAMES = ", ".join(f"[{name}]" for name in TABLES)


def load_toml(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a TOML configuration file; UsageError names the file."""
    try:
        tables = tomllib.loads(read_text(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not valid TOML: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {name!r} is outside of a table; use {_TABLE_NAMES}")
        if name not in TABLES:
            raise UsageError(f"{path}: there is no table [{name}]; there are {_TABLE_NAMES}")
    return tables
