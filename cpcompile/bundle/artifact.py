"""What an exporter hands to the bundle writer: the files of one engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cpcompile.targets.plan_info import PlanInfo


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One engine: its files (relative to its folder), how to open it, and its share of the weights file."""

    variant: str
    """Runtime and precision, for example `cpu-fp32`."""
    runtime: str
    precision: str
    provider: str
    """Execution provider of ONNX Runtime; empty for engines that it does not run."""
    device: str
    model_file: str
    files: tuple[str, ...]
    shared_bytes: int
    """Bytes of the shared weights file that this engine maps."""
    contexts: tuple[str, ...] = ()
    """The contexts that the input `context` selects from, by index; empty if the engine serves one."""
    session_options: Mapping[str, str] = field(default_factory=dict)
    provider_options: Mapping[str, str] = field(default_factory=dict)
    plan: PlanInfo | None = None
    """What a TensorRT plan was built by and for; None if the engine is an ONNX graph."""
