from itertools import pairwise

import numpy as np
import pytest
import torch

from cpcompile.core.config import ModelConfig, preset
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.models.decoder import Decoder
from cpcompile.models.gates import apply_gate

IDS = torch.arange(2 * 11).reshape(2, 11) * 7 % 512


def make(config: ModelConfig, seed: int = 0) -> tuple[Decoder, Selection]:
    torch.manual_seed(seed)
    model = Decoder(config, contexts=3).double().eval()
    generator = np.random.default_rng(seed)
    selection = Selection(
        ("a", "b", "c"),
        {
            UnitKind.FFN: generator.random((3, config.layers, config.ffn // config.align)) < 0.4,
            UnitKind.HEAD: generator.random((3, config.layers, config.kv_heads)) < 0.6,
        },
    )
    for table in selection.kept.values():
        table[:, :, 0] = True
    model.select(selection)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("table"):
                parameter *= torch.rand_like(parameter) + 0.5
            else:
                parameter += torch.randn_like(parameter) * 0.05
    return model, selection


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_computing_only_kept_units_is_the_masked_model(tied: bool, kv_heads: int) -> None:
    config = ModelConfig(vocabulary=512, width=64, layers=2, heads=4, kv_heads=kv_heads, ffn=128, align=16, tied=tied)
    model, selection = make(config)
    with torch.no_grad():
        for index, context in enumerate(selection.contexts):
            masked = model(IDS, torch.tensor(index))
            kept = model.kept(selection, context)
            assert torch.allclose(model(IDS, torch.tensor(index), kept=kept), masked, rtol=0, atol=1e-12)


def test_kept_training_leaves_other_units_untouched() -> None:
    model, selection = make(preset("nano"))
    model(IDS, torch.tensor(0), kept=model.kept(selection, "a")).square().mean().backward()
    gone = ~selection.kept[UnitKind.FFN][0, 0]
    rows = model.layers[0].ffn.up.weight.grad.reshape(len(gone), -1)
    assert rows[torch.from_numpy(gone)].abs().max() == 0
    assert rows[torch.from_numpy(~gone)].abs().min(dim=0).values.max() > 0
    assert model.layers[0].ffn_gate.table.grad[0][torch.from_numpy(gone)].abs().max() == 0
    assert model.layers[0].ffn_gate.table.grad[1:].abs().max() == 0


def test_sorting_units_by_partition_changes_nothing_but_the_order() -> None:
    model, selection = make(preset("nano"))
    with torch.no_grad():
        before = [model(IDS, torch.tensor(i)) for i in range(3)]
        by_partition = model.sort_units(selection)
        after = [model(IDS, torch.tensor(i)) for i in range(3)]
    for old, new in zip(before, after, strict=True):
        assert torch.allclose(old, new, rtol=0, atol=1e-12)
    for kind, table in by_partition.kept.items():
        assert np.array_equal(table.sum(axis=2), selection.kept[kind].sum(axis=2))
        for layer in range(table.shape[1]):
            owners = [tuple(column) for column in table[:, layer].T.tolist()]
            changes = sum(a != b for a, b in pairwise(owners))
            assert changes == len(set(owners)) - 1, "units of one partition lie side by side"


def test_sizes_of_what_is_kept_add_up() -> None:
    config = preset("nano")
    model, selection = make(config)
    sizes = model.kept_sizes(selection, "b")
    ffn = int(selection.kept[UnitKind.FFN][1].sum()) * config.align * config.width * 3
    heads = int(selection.kept[UnitKind.HEAD][1].sum())
    group = config.heads // config.kv_heads * config.head_dim
    attention = heads * (2 * group + 2 * config.head_dim) * config.width
    norms = (2 * config.layers + 1) * config.width
    assert sum(sizes.values()) == ffn + attention + norms + config.vocabulary * config.width


def test_selecting_keeps_learned_scales_and_starts_new_units_at_one() -> None:
    model, selection = make(preset("nano"))
    table = model.layers[0].ffn_gate.table
    kept = torch.from_numpy(selection.kept[UnitKind.FFN][:, 0]).clone()
    before = table.detach().clone()
    new = (~kept[0]).nonzero()[0, 0]
    old = kept[0].nonzero()[0, 0]
    kept[0, new], kept[0, old] = True, False
    model.layers[0].ffn_gate.select(kept)
    assert table[0, new] == 1
    assert table[0, old] == 0
    unchanged = kept & (before != 0)
    assert torch.equal(table[unchanged], before[unchanged])


def test_positions_are_relative_and_the_future_is_unseen() -> None:
    model, _ = make(preset("nano"))
    with torch.no_grad():
        whole = model(IDS, torch.tensor(0))
        part = model(IDS[:, :5], torch.tensor(0))
    assert torch.allclose(whole[:, :5], part, rtol=0, atol=1e-12)


def test_a_gate_multiplies_whole_units() -> None:
    hidden = torch.ones(2, 3, 6)
    assert apply_gate(hidden, torch.tensor([1.0, 0.0, 2.0]), 2)[0, 0].tolist() == [1, 1, 0, 0, 2, 2]
    per_sequence = torch.tensor([[[1.0, 0.0, 2.0]], [[0.0, 1.0, 0.0]]])
    assert apply_gate(hidden, per_sequence, 2)[:, 0].tolist() == [[1, 1, 0, 0, 2, 2], [0, 0, 1, 1, 0, 0]]


def test_one_row_of_gates_serves_every_context() -> None:
    config = preset("nano")
    _, selection = make(config)
    shared = Selection(selection.contexts, {kind: table[[0, 0, 0]] for kind, table in selection.kept.items()})
    model = Decoder(config, contexts=1)
    model.select(shared)
    assert [row.item() for row in map(model.gate_row, range(3)) if row is not None] == [0, 0, 0]
    for index, layer in enumerate(model.blocks):
        assert np.array_equal(layer.ffn_gate.table.detach() != 0, selection.kept[UnitKind.FFN][:1, index])
    assert Decoder(config).gate_row(0) is None
