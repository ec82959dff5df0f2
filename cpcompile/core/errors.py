"""Every error that cpcompile raises on purpose, and the exit code each maps to.

    CpcompileError   1   the work failed (parity missed, disk full, parameters unaccounted for)
    UsageError       2   the input or the settings are wrong; the user can fix them

Exit code 3, the machine was too noisy to decide, is a verdict and no error.

A message says what was wrong, where (file, layer, context) and what to do.
"""

from __future__ import annotations


class CpcompileError(Exception):
    """The work failed. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(CpcompileError):
    """The input or the settings are wrong."""

    exit_code = 2


def printable(text: str) -> str:
    """In one line, with a mark for every character that a terminal or a workflow takes for a command."""
    return "".join(
        sign if sign.isprintable() else " " if sign.isspace() else "\N{REPLACEMENT CHARACTER}" for sign in text
    )


def first_line(error: BaseException) -> str:
    """What an error of somebody else's library says, for a sentence of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
