"""Gradients of gates against finite differences, and least squares against the normal equations' own promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from cpcompile.errors import UsageError
from cpcompile.partitioning import PartitionedModule, partition
from cpcompile.partitioning.importance import measure_group_importance, next_token_loss
from cpcompile.partitioning.recover import recover_least_squares
from cpcompile.selection import Selection, UnitKind
from tests.unit.partitioning.models import WIDTH, Feed, SharedWeights, randomise

SHAPES = ({0: Dim("batch"), 1: Dim("sequence")},)


def two_layers() -> PartitionedModule:
    model = nn.Sequential(Feed(), Feed())
    randomise(model, 3)
    return partition(model, (torch.randn(2, 5, WIDTH),), dynamic_shapes=SHAPES, align=8)


def squares(output: Tensor, _inputs: tuple[Tensor, ...]) -> Tensor:
    return output.square().mean(dim=(1, 2)).sum()


def test_importance_is_the_mean_square_of_each_sequences_gradient() -> None:
    module = two_layers().double()
    inputs = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = measure_group_importance(module, [(inputs[:3],), (inputs[3:],)], squares, None)[UnitKind.FFN]
    expected, step = np.zeros((2, 4)), 1e-5
    for layer in range(2):
        for unit in range(4):
            for sequence in inputs.split(1):
                losses = []
                for sign in (1, -1):
                    rows = [torch.ones(4, dtype=torch.float64) for _ in range(2)]
                    rows[layer][unit] += sign * step
                    with torch.no_grad():
                        losses.append(float(squares(module.with_rows(sequence, rows=rows), ())))
                expected[layer, unit] += ((losses[0] - losses[1]) / (2 * step)) ** 2 / 4
    assert expected.min() > 0
    assert np.allclose(got, expected, rtol=1e-6)


def test_importance_of_a_language_model_at_its_table() -> None:
    model = SharedWeights()
    randomise(model, 1)
    ids = torch.arange(24).reshape(4, 6)
    module = partition(model, (ids,), dynamic_shapes=SHAPES, align=8)
    with torch.no_grad():
        module.group_gates[0].table[0, 1] = 0.0
    whole = measure_group_importance(module, [(ids,)], next_token_loss, None)[UnitKind.FFN]
    cut = measure_group_importance(module, [(ids,)], next_token_loss, 0)[UnitKind.FFN]
    assert whole.shape == (2, 4) and (whole > 0).all()
    assert not np.allclose(whole, cut)


def test_recovery_comes_closer_and_leaves_the_module_alone() -> None:
    module = two_layers()
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(3, WIDTH, generator=generator)  # text has structure: inputs of three dimensions
    batches = [(torch.randn(4, 5, 3, generator=generator) @ mixing,) for _ in range(6)]
    kept = np.zeros((1, 2, 4), dtype=np.bool_)
    kept[0, :, :2] = True
    selection = Selection(("a",), {UnitKind.FFN: kept})
    before = {name: p.clone() for name, p in module.named_parameters()}
    weights = recover_least_squares(module, batches[:4], "a", selection)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert set(weights) == {"0.down.weight", "1.down.weight"}
    assert all(not weight[:, 16:].any() and weight[:, :16].all() for weight in weights.values())

    def error() -> float:
        with torch.no_grad():
            wanted = [module.with_rows(*batch, rows=[torch.ones(4)] * 2) for batch in batches[4:]]
            rows = [torch.tensor([1.0, 1.0, 0.0, 0.0])] * 2
            module.model.load_state_dict(weights_now, strict=False)
            got = [module.with_rows(*batch, rows=rows) for batch in batches[4:]]
            module.model.load_state_dict({n: before[f"model.{n}"] for n in weights}, strict=False)
        return float(sum((a - b).square().sum() for a, b in zip(wanted, got, strict=True)))

    weights_now: dict[str, Tensor] = {}
    without = error()
    weights_now = weights
    assert error() < 0.1 * without


def test_nothing_to_recover() -> None:
    module = two_layers()
    whole = Selection(("a",), {UnitKind.FFN: np.ones((1, 2, 4), dtype=np.bool_)})
    assert recover_least_squares(module, [(torch.randn(1, 3, WIDTH),)], "a", whole) == {}
    with pytest.raises(UsageError, match="a: recovery needs at least one batch"):
        recover_least_squares(module, [], "a", whole)
