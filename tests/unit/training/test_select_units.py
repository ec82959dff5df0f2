"""Units of a module of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpcompile.core.errors import UsageError
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


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, _: 3.0, "loss returned a float: a tensor is needed"),
        (lambda output, _: output, r"loss returned \[2, 5, \d+\] values: one is needed"),
        (lambda output, _: output.detach().sum(), "without a gradient"),
        (lambda output, _: output.sum() * float("nan"), "gradients of the loss are NaN or infinite"),
    ],
)
def test_a_loss_that_says_nothing_is_refused(loss: Any, message: str) -> None:
    module = partition(nn.Sequential(Feed(), Feed()), (torch.randn(2, 5, WIDTH),), contexts=2, align=8)
    batches = {name: [(torch.randn(2, 5, WIDTH),)] for name in ("a", "b")}
    with pytest.raises(UsageError, match=message):
        select_units(module, batches, loss, {"ffn": 0.5})


def test_a_module_without_gates_is_refused() -> None:
    with pytest.raises(UsageError, match="a Linear has no gates; give what `partition` returned"):
        select_units(nn.Linear(2, 2), {"a": []}, lambda output, _: output.sum(), {"ffn": 0.5})  # type: ignore[arg-type]
