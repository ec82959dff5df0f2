"""Units of a module of one's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cpcompile.core.selection import UnitKind
from cpcompile.partitioning import partition
from cpcompile.training.select_units import select_units
from tests.unit.partitioning.models import WIDTH, Feed, randomise


@pytest.mark.parametrize(("budget", "read"), [(1.0, 0), (0.5, 2)])
def test_batches_are_read_only_where_units_compete(budget: float, read: int) -> None:
    model = nn.Sequential(Feed(), Feed())
    randomise(model, 3)
    module = partition(model, (torch.randn(2, 5, WIDTH),), contexts=2, align=8)
    drawn = 0

    def batches() -> Iterator[tuple[Tensor, ...]]:
        nonlocal drawn
        drawn += 1
        yield (torch.randn(2, 5, WIDTH),)

    selection = select_units(
        module, {"a": batches(), "b": batches()}, lambda output, _: output.square().sum(), {"ffn": budget}
    )
    assert drawn == read
    assert selection.kept[UnitKind.FFN].mean() == budget
