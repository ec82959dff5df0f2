"""The command line."""

from cpcompile.cli.entry import main

__all__ = ["main"]
