"""The version of cpcompile."""

__version__ = "0.1.0"
