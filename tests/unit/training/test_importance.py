import torch
from torch.nn import functional as F

from cpcompile.core.config import preset
from cpcompile.core.selection import UnitKind
from cpcompile.models.decoder import Decoder
from cpcompile.training.importance import measure_importance


def test_importance_is_the_mean_square_of_each_sequences_gate_gradient() -> None:
    """Against the definition: one sequence at a time, gates as plain leaves."""
    torch.manual_seed(0)
    config = preset("nano")
    model = Decoder(config, contexts=1).double()
    windows = torch.randint(0, config.vocabulary, (3, 17))
    expected_head = torch.zeros(config.layers, config.kv_heads, dtype=torch.float64)
    expected_ffn = torch.zeros(config.layers, config.ffn // config.align, dtype=torch.float64)
    for window in windows:
        rows = {
            units.kind: [torch.ones(units.count, dtype=torch.float64, requires_grad=True) for _ in range(units.layers)]
            for units in model.units()
        }
        logits = model(window[None, :-1], rows=rows)
        (F.cross_entropy(logits[0], window[1:], reduction="sum") / 17).backward()
        for kind, expected in ((UnitKind.HEAD, expected_head), (UnitKind.FFN, expected_ffn)):
            for layer, row in enumerate(rows[kind]):
                assert row.grad is not None
                expected[layer] += row.grad**2 / 3
    measured = measure_importance(model, windows.split(2), None)
    assert torch.allclose(torch.from_numpy(measured[UnitKind.HEAD]), expected_head, rtol=1e-6, atol=0)
    assert torch.allclose(torch.from_numpy(measured[UnitKind.FFN]), expected_ffn, rtol=1e-6, atol=0)


def test_a_unit_without_influence_has_no_importance() -> None:
    torch.manual_seed(0)
    config = preset("nano")
    model = Decoder(config, contexts=1)
    with torch.no_grad():
        model.layers[1].ffn.down.weight[:, : config.align] = 0
    measured = measure_importance(model, [torch.randint(0, config.vocabulary, (2, 9))], None)
    assert measured[UnitKind.FFN][1, 0] == 0
    assert measured[UnitKind.FFN][1, 1:].min() > 0
