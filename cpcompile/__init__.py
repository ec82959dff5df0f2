"""cpcompile: train one model for many contexts, compile each context into its own small static graph."""

__version__ = "0.1.0"
