"""Controls: branches trained along with the partitioned model, each to show what one part of the method is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Choice(StrEnum):
    """How the units of a control are chosen."""

    ALL = "all"
    PARTITION = "those of the partitioned model before recalibration"
    ONE_FOR_ALL = "the most important, the same for all contexts"
    RANDOM_ONE_FOR_ALL = "at random, the same for all contexts"
    RANDOM = "at random, per context"
    FIRST = "the first of every layer"


@dataclass(frozen=True)
class Control:
    """One control."""

    name: str
    meaning: str
    """Explanation for reports."""
    from_scratch: bool
    """Whether it is trained from scratch over the whole schedule, instead of from the dense parent."""
    distilled: bool
    selection: Choice

    @property
    def trained(self) -> bool:
        """Whether it is a branch of its own; otherwise it is the dense baseline with its units removed."""
        return self.from_scratch or self.distilled

    @property
    def one_for_all(self) -> bool:
        """Whether all contexts share one selection and one row of gates."""
        return self.selection in (Choice.ONE_FOR_ALL, Choice.RANDOM_ONE_FOR_ALL)


CONTROLS: Mapping[str, Control] = MappingProxyType(
    {
        control.name: control
        for control in (
            Control(
                "one-mask",
                "one selection and one gate scale for all contexts at the same budget, trained like the "
                "partitioned model: what pruning gives",
                from_scratch=False,
                distilled=True,
                selection=Choice.ONE_FOR_ALL,
            ),
            Control(
                "importance-only",
                "the partitioned model's first selection on the dense baseline, without training",
                from_scratch=False,
                distilled=False,
                selection=Choice.PARTITION,
            ),
            Control(
                "random-one",
                "one random selection and one gate scale for all contexts, trained like the partitioned model",
                from_scratch=False,
                distilled=True,
                selection=Choice.RANDOM_ONE_FOR_ALL,
            ),
            Control(
                "random-per-context",
                "a random selection per context, trained like the partitioned model",
                from_scratch=False,
                distilled=True,
                selection=Choice.RANDOM,
            ),
            Control(
                "small-dense",
                "a dense model of the active size from scratch, same tokens and schedule",
                from_scratch=True,
                distilled=False,
                selection=Choice.FIRST,
            ),
            Control(
                "small-dense-distilled",
                "a dense model of the active size from scratch, distilled like the partitioned model",
                from_scratch=True,
                distilled=True,
                selection=Choice.FIRST,
            ),
            Control(
                "dense-distilled",
                "the dense parent trained on whole, distilled like the partitioned model",
                from_scratch=False,
                distilled=True,
                selection=Choice.ALL,
            ),
        )
    }
)
