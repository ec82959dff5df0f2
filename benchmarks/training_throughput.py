"""Training throughput: dense steps compared with masked steps that compute only the kept units.

    python benchmarks/training_throughput.py

The same model (preset tiny, FFN 25 %, heads 50 %), the same batches, forward, backward and update,
interleaved in one process. The limit is the ratio of the parameters that take part in matrix
products. The teacher's forward is not part of a masked step (its targets are cached).
"""

from __future__ import annotations

import click
import torch
from common import save, spread, time_sides
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from cpcompile.core.config import TrainConfig, preset
from cpcompile.core.selection import UnitKind
from cpcompile.models.decoder import Decoder
from cpcompile.training.allocation import allocate_random
from cpcompile.training.branch import make_optimizer
from cpcompile.validation.speed import ratio_interval

CONTEXTS = ("a", "b", "c")


@click.command()
@click.option("--model", "preset_name", default="tiny", help="Preset.")
@click.option("--rounds", default=40)
def main(preset_name: str, rounds: int) -> None:
    torch.manual_seed(0)
    config, model_config = TrainConfig(), preset(preset_name)
    dense = Decoder(model_config)
    gated = Decoder(model_config, contexts=len(CONTEXTS))
    importance = {
        units.kind: torch.rand(len(CONTEXTS), units.layers, units.count, dtype=torch.float64).numpy()
        for units in gated.units()
        if units.kind in (UnitKind.FFN, UnitKind.HEAD)
    }
    budgets = {UnitKind(kind): budget for kind, budget in config.budgets.items()}
    selection = allocate_random(CONTEXTS, importance, budgets, seed=0, floor=config.floor, one_for_all=False)
    gated.select(selection)
    kept = [gated.kept(selection, context) for context in CONTEXTS]
    windows = torch.randint(0, model_config.vocabulary, (len(CONTEXTS), config.batch, config.sequence + 1))

    def step(model: Decoder, optimizer: torch.optim.Optimizer) -> None:
        for index, batch in enumerate(windows):
            inputs, labels = batch[:, :-1], batch[:, 1:].flatten()
            gated_inputs = {"context": torch.tensor(index), "kept": kept[index]} if model is gated else {}
            logits = model(inputs, **gated_inputs)
            F.cross_entropy(logits.flatten(0, 1), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    optimizers = {model: make_optimizer(model, {}, config) for model in (dense, gated)}
    seconds = time_sides(
        {"dense": lambda: step(dense, optimizers[dense]), "masked": lambda: step(gated, optimizers[gated])},
        rounds=rounds,
        settle=0,
    )
    tokens = len(CONTEXTS) * config.batch * config.sequence
    speed = {name: spread(tokens / values) for name, values in seconds.items()}
    ratio, low, high = ratio_interval(seconds["dense"], seconds["masked"], seed=0)
    total = sum(p.numel() for p in dense.parameters() if p.ndim == 2)
    kept_size = sum(n for name, n in gated.kept_sizes(selection, "a").items() if "norm" not in name)
    table = Table(title=f"training throughput, {preset_name}, {tokens} tokens a step")
    for column in ("step", "tokens/s (median)", "quartiles"):
        table.add_column(column)
    for name, row in speed.items():
        table.add_row(name, f"{row['median']:,.0f}", f"{row['quartile_1']:,.0f} – {row['quartile_3']:,.0f}")
    Console().print(table)
    limit = total / kept_size
    print(
        f"masked / dense: {ratio:.2f}x ({low:.2f} to {high:.2f}); limit by parameters in matrix products: {limit:.2f}x"
    )
    ratios = {"ratio": ratio, "ratio_low": low, "ratio_high": high, "limit": limit}
    save("training_throughput", {"preset": preset_name, "tokens_per_second": speed, **ratios})


if __name__ == "__main__":
    main()
