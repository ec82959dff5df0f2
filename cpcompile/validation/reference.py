"""References of engines: the eager model that they were compiled from, with inputs to compare on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cpcompile.core.measured import NotMeasured
from cpcompile.core.rounding import Scheme
from cpcompile.core.types import Array, Feeds, Steps, unwatched
from cpcompile.machine.memory import ProcessMemory
from cpcompile.report.results import Quality

Outputs = dict[str, Array]
"""All outputs of a model, by name."""
Run = Callable[[Feeds], Outputs]
Schemes = Mapping[str, Scheme]
"""How an engine has rounded its parameters, by name."""
UNROUNDED: Schemes = {}


@dataclass(frozen=True)
class Timed:
    """Inputs of one shape; `sequence` is None where they are not text."""

    batch: int
    sequence: int | None
    feeds: Feeds


class Reference(Protocol):
    """The eager side of a validation, context by context. Inputs are given as the context's engines read them."""

    contexts: tuple[str, ...]
    logits: str | None
    """The output whose last axis is the classes, if any."""
    no_inputs: str
    """Why a context may have no inputs for the comparison."""
    digest: str
    """Of all that engines are compared on."""

    def masked(self, context: str, schemes: Schemes = UNROUNDED, *, round_inputs: bool = True) -> Run:
        """The eager model with the gates of `context`, and parameters rounded by their `schemes`.

        round_inputs: whether products round their inputs as the schemes do.
        """

    def exact(self, context: str, schemes: Schemes = UNROUNDED) -> Run:
        """The same in float64."""

    def dense(self, context: str) -> Run | NotMeasured:
        """What the engine's speed is compared with."""

    def compiled(self, context: str) -> Run | NotMeasured:
        """`dense` through torch.compile; what its compiler raises comes with the first run."""

    def as_engine(self, context: str, run: Run, *, all_logits: bool = False) -> Run:
        """`run`, which reads what the whole model reads, as the context's engines read it.

        `all_logits` leaves outputs as they are, for timings.
        """

    def dense_memory(self, context: str, *, threads: int) -> ProcessMemory | NotMeasured:
        """What `dense` needs in a process of its own."""

    def inputs(self, context: str) -> Iterator[Feeds]:
        """Inputs for parity: real ones, of several shapes."""

    def timed(self, context: str) -> Sequence[Timed]:
        """Inputs for timings, the first of them for memory and placement as well."""

    def quality(self, context: str, engine: Run | NotMeasured, *, steps: Steps = unwatched) -> Quality:
        """The effect of the context's specialisation on quality."""
