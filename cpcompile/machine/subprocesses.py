"""Measurements in a fresh process, which has its memory to itself."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from cpcompile.core.errors import CpcompileError


def in_fresh_process(*arguments: str) -> Any:
    """Run `python arguments…` and return the JSON of the last line that it prints; CpcompileError if it fails.

    `-P` keeps the working folder off the child's import path: a file there may have the name of a library.
    """
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").rsplit("\n", maxsplit=1)[-1]
        raise CpcompileError(f"the measuring process failed ({' '.join(arguments[:2])}): {last}")
    return json.loads(done.stdout.strip().rsplit("\n", maxsplit=1)[-1])
