"""The settings of `cpcompile check`: what may change before it fails."""

from __future__ import annotations

from dataclasses import dataclass

from cpcompile.core.coercion import coerce_fields, require


@dataclass(frozen=True, kw_only=True)
class MaxIncrease:
    """Largest allowed increase over the baseline."""

    max_increase: float


@dataclass(frozen=True, kw_only=True)
class MaxDecrease:
    """Largest allowed decrease from the baseline."""

    max_decrease: float


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """How a bundle is compared with its baseline (`cpcompile.check`).

    Limits are relative to the baseline's value (0.01 is 1 %) unless a field says otherwise.
    """

    parity_error: MaxIncrease = MaxIncrease(max_increase=3.0)
    """Increase of the error against the eager model, within the tolerance of parity: processors round differently."""
    perplexity: MaxIncrease = MaxIncrease(max_increase=0.01)
    accuracy: MaxDecrease = MaxDecrease(max_decrease=0.01)
    """Absolute decrease, such as from 0.40 to 0.39."""
    bundle_bytes: MaxIncrease = MaxIncrease(max_increase=0.01)
    bytes: MaxIncrease = MaxIncrease(max_increase=0.01)
    """Size of one engine with its share of the weights, or of an ONNX file."""
    parameters: MaxIncrease = MaxIncrease(max_increase=0.0)
    nodes: MaxIncrease = MaxIncrease(max_increase=0.1)
    """Nodes that ran, after the runtime's own fusions; for an ONNX file, nodes that it contains."""
    memory: MaxIncrease = MaxIncrease(max_increase=0.1)
    """Peak resident and private memory while running."""
    speed_ratio: MaxDecrease = MaxDecrease(max_decrease=0.1)
    """Speedup of the engine over the dense model, both timed in one run."""
    rounds: int = 60
    """Interleaved timing rounds per shape; a baseline is measured with twice as many."""
    attempts: int = 2
    """How often speed and memory beyond their limits are measured again, each time with twice the rounds."""

    def __post_init__(self) -> None:
        coerce_fields(self, "check")
        require(self.rounds >= 2, f"check.rounds is {self.rounds}: an interval needs at least 2")
        require(self.attempts >= 0, f"check.attempts is {self.attempts}: it cannot be negative")
        for criterion, limits in vars(self).items():
            for name, value in vars(limits).items() if isinstance(limits, MaxIncrease | MaxDecrease) else ():
                require(value >= 0, f"check.{criterion}.{name} is {value}: it cannot be negative")
                require(
                    name != "max_decrease" or value < 1,
                    f"check.{criterion}.{name} is {value}, so nothing can fail: it has to be below 1; 0.05 is 5 %",
                )
