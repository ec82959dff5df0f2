"""Every error that cpcompile raises on purpose, and the exit code each maps to.

    CpcompileError   1   the work failed (parity missed, disk full, parameters unaccounted for)
    UsageError       2   the input or the settings are wrong; the user can fix them

Exit code 3, for a machine too noisy to decide, is a verdict, not an error.

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
    """`text` on one line, with a placeholder for characters that a terminal or a workflow may take for commands."""
    return "".join(
        sign if sign.isprintable() else " " if sign.isspace() else "\N{REPLACEMENT CHARACTER}" for sign in text
    )


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, for use in our messages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
