"""Gradients of gates against finite differences, and least squares against the normal equations' own promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.partitioning import PartitionedModule, partition
from cpcompile.partitioning.recover import recover_least_squares
from cpcompile.training.importance import measure_group_importance
from tests.unit.partitioning.models import WIDTH, Feed, SharedWeights, randomise

SHAPES = ({0: Dim("batch"), 1: Dim("sequence")},)


def two_layers() -> PartitionedModule:
    model = nn.Sequential(Feed(), Feed())
    randomise(model, 3)
    return partition(model, (torch.randn(2, 5, WIDTH),), dynamic_shapes=SHAPES, align=8)


def squares(output: Tensor, _inputs: tuple[Tensor, ...]) -> Tensor:
    return output.square().mean(dim=(1, 2)).sum()


def next_token_loss(logits: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Cross-entropy of the next token, mean over tokens, summed over sequences; inputs[0] are token ids."""
    ids = inputs[0]
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.reshape(ids.shape[0], -1).mean(1).sum()


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


def structured(generator: torch.Generator, sequences: int, dimensions: int = 3) -> Tensor:
    """Text has structure: inputs that lie in few dimensions."""
    mixing = torch.randn(dimensions, WIDTH, generator=generator)
    return torch.randn(sequences, 5, dimensions, generator=generator) @ mixing


def outputs(module: PartitionedModule, inputs: Tensor, kept: list[float]) -> Tensor:
    with torch.no_grad():
        result: Tensor = module.with_rows(inputs, rows=[torch.tensor(kept)] * 2)
    return result


def test_recovery_comes_closer_on_other_text() -> None:
    module = two_layers()
    inputs = structured(torch.Generator().manual_seed(5), 24)
    kept = np.zeros((1, 2, 4), dtype=np.bool_)
    kept[0, :, :2] = True
    before = {name: p.clone() for name, p in module.named_parameters()}
    wanted = outputs(module, inputs[16:], [1.0] * 4)
    cut = outputs(module, inputs[16:], [1.0, 1.0, 0.0, 0.0])
    selection, seen = Selection(("a",), {UnitKind.FFN: kept}), list[tuple[int, int]]()
    names = recover_least_squares(
        module, (inputs[:16],), ["a"] * 16, selection, progress=lambda *state: seen.append(state)
    )
    assert names == ("0.down.weight", "1.down.weight")
    assert seen == [(0, 2), (1, 2), (2, 2)]
    recovered = outputs(module, inputs[16:], [1.0, 1.0, 0.0, 0.0])
    assert (wanted - recovered).square().sum() < 0.1 * (wanted - cut).square().sum()
    for name, p in module.named_parameters():
        if name.removeprefix("model.") in names:
            assert torch.equal(p[:, 16:], before[name][:, 16:])  # what nobody keeps, nobody reads
            assert not torch.equal(p[:, :16], before[name][:, :16])
        else:
            assert torch.equal(p, before[name])


def test_one_weight_serves_all_contexts() -> None:
    """The normal equations of both contexts at once: no other weight of the first layer has a smaller error."""
    model = nn.Sequential(Feed(), Feed())
    randomise(model, 3)
    module = partition(model, (torch.randn(2, 5, WIDTH),), contexts=2, dynamic_shapes=SHAPES, align=8)
    generator = torch.Generator().manual_seed(6)
    inputs = torch.cat((structured(generator, 8), structured(generator, 8)))
    kept = np.zeros((2, 2, 4), dtype=np.bool_)
    kept[0, :, :2] = kept[1, :, 1:3] = True
    rows = [torch.from_numpy(kept[[0] * 8 + [1] * 8, layer]).float() for layer in range(2)]
    whole = torch.ones(16, 4)
    layer = module.model.get_submodule("0.down")
    assert isinstance(layer, nn.Linear)
    read: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, args: read.append(args[0].double()), prepend=True)
    with torch.no_grad():
        module.with_rows(inputs, rows=[whole, whole])
    handle.remove()
    wanted = read[0].flatten(0, 1) @ layer.weight.double().T
    names = recover_least_squares(
        module, (inputs,), ["a"] * 8 + ["b"] * 8, Selection(("a", "b"), {UnitKind.FFN: kept}), ridge=0.0
    )
    assert names == ("0.down.weight", "1.down.weight")
    masked = (read[0] * rows[0].repeat_interleave(8, dim=1)[:, None]).flatten(0, 1)
    residual = wanted - masked @ layer.weight.detach().double().T
    gradient = masked.T @ residual
    assert gradient.abs().max() < 1e-3 * (masked.T @ wanted).abs().max()


def test_what_is_called_twice_keeps_its_weights() -> None:
    model = SharedWeights()
    randomise(model, 1)
    ids = torch.arange(24).reshape(4, 6)
    module = partition(model, (ids,), dynamic_shapes=SHAPES, align=8)
    before = {name: p.clone() for name, p in module.named_parameters()}
    kept = np.zeros((1, len(module.of_kind(UnitKind.FFN)), 4), dtype=np.bool_)
    kept[..., :2] = True
    twice = {consumer for (_, consumer), count in module.calls.items() if count > 1}
    assert twice
    fitted = recover_least_squares(module, (ids,), ["a"] * 4, Selection(("a",), {UnitKind.FFN: kept}))
    assert not {name.rpartition(".")[0] for name in fitted} & twice
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) or name.removeprefix("model.") in fitted


def test_nothing_to_recover() -> None:
    module = two_layers()
    whole = Selection(("a",), {UnitKind.FFN: np.ones((1, 2, 4), dtype=np.bool_)})
    layer, batches = module.model.get_submodule("0.down"), list[int]()
    layer.register_forward_pre_hook(lambda _module, args: batches.append(args[0].shape[0]))
    assert recover_least_squares(module, (torch.randn(4, 3, WIDTH),), ["a"] * 4, whole) == ()
    assert batches == [1]  # the calls were counted, nothing else was run
    with pytest.raises(UsageError, match="recovery needs sequences"):
        recover_least_squares(module, (torch.randn(2, 3, WIDTH),), ["a"], whole)
