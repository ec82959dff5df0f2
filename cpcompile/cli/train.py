"""`cpcompile train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cpcompile.cli.interruption import STARTS_ANEW, left_behind
from cpcompile.cli.options import FilePath, names_in
from cpcompile.cli.settings import load_toml
from cpcompile.core.config import CONTROLS, PRESETS, PRETRAINED_TRAIN, RECOVERIES, ModelConfig, TrainConfig, preset
from cpcompile.core.errors import UsageError
from cpcompile.core.overrides import override
from cpcompile.files.whole_files import require_file_path


@click.command(context_settings={"show_default": True})
@click.option("--data", type=FilePath, required=True, help="Folder with a subfolder or a file per context.")
@click.option("--out", "-o", type=FilePath, default="model.pt", help="Checkpoint to write.")
@click.option("--config", type=FilePath, help="TOML file with the tables [model] and [train]; flags override it.")
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), help="Model shape.  [default: tiny]")
@click.option("--from-pretrained", type=FilePath, metavar="DIR", help="Folder of a Hugging Face model or a GGUF.")
@click.option("--steps", type=int, help=f"Optimizer steps of the whole schedule.  [default: {TrainConfig.steps}]")
@click.option("--batch", type=int, help=f"Sequences per context and step.  [default: {TrainConfig.batch}]")
@click.option("--sequence", type=int, help=f"Tokens per sequence.  [default: {TrainConfig.sequence}]")
@click.option("--learning-rate", type=float, help=f"Peak learning rate.  [default: {TrainConfig.learning_rate}]")
@click.option("--seed", type=int, help=f"Runs with the same seed give the same result.  [default: {TrainConfig.seed}]")
@click.option("--ffn-budget", type=float, help="Part of the FFN blocks that a context keeps.  [default: 0.25]")
@click.option("--head-budget", type=float, help="Part of the heads that a context keeps.  [default: 0.5]")
@click.option(
    "--recover", type=click.Choice(RECOVERIES), help="How to refit a pretrained model after units are removed."
)
@click.option("--controls", metavar="NAMES", help=f"Comma-separated, or 'all': {', '.join(CONTROLS)}.")
@click.option("--tokenizer", type=FilePath, help="A tokenizer.json instead of one trained on the data.")
@click.option("--text-field", default="text", help="Field of the records in .jsonl and .parquet.")
@click.option("--cache", type=FilePath, help="Folder that caches token ids.  [default: ~/.cache/cpcompile]")
@click.option("--resume", is_flag=True, help="Resume an interrupted run.")
@click.option("--no-held-out", is_flag=True, help="Leave the held-out sample out of the checkpoint.")
def train(
    data: Path,
    out: Path,
    config: Path | None,
    preset_name: str | None,
    from_pretrained: Path | None,
    controls: str | None,
    tokenizer: Path | None,
    text_field: str,
    cache: Path | None,
    resume: bool,
    no_held_out: bool,
    ffn_budget: float | None,
    head_budget: float | None,
    **flags: Any,
) -> None:
    """Train a partitioned model, its dense baseline, and the requested controls.

    \b
    Examples:
      cpcompile train --data corpus/ --out model.pt
      cpcompile train --data corpus/ --preset small --steps 20000 --controls one-mask,small-dense
      cpcompile train --data corpus/ --out model.pt --resume
      cpcompile train --data corpus/ --from-pretrained SmolLM2-135M/ --recover least-squares --steps 0

    --data names a folder that has one entry per context: a subfolder of text files, or a .txt, .jsonl, .jsonl.gz or
    .parquet file.
    """
    require_file_path(out, ".pt")
    if not text_field:
        raise UsageError("--text-field is empty; name a field of the records")
    tables = load_toml(config) if config else {}
    if from_pretrained and (preset_name or tokenizer or tables.get("model")):
        raise UsageError("--from-pretrained sets shape and tokenizer; leave out --preset, [model] and --tokenizer")
    shape = override(preset(preset_name or "tiny"), tables.get("model", {}), where=f"{config}: model")
    train_config = PRETRAINED_TRAIN if from_pretrained else TrainConfig()
    train_config = override(train_config, tables.get("train", {}), where=f"{config}: train")
    budgets = dict(train_config.budgets) | {
        kind: budget for kind, budget in (("ffn", ffn_budget), ("head", head_budget)) if budget is not None
    }
    names = CONTROLS if controls == "all" else names_in(controls)
    train_config = override(train_config, flags | {"budgets": budgets, "controls": names}, where="train")
    run_training(
        data,
        out,
        from_pretrained or shape,
        train_config,
        tokenizer=tokenizer,
        text_field=text_field,
        cache=cache,
        resume=resume,
        held_out=not no_held_out,
    )


def run_training(
    data: Path,
    out: Path,
    source: ModelConfig | Path,
    train_config: TrainConfig,
    *,
    tokenizer: Path | None,
    text_field: str,
    cache: Path | None,
    resume: bool,
    held_out: bool,
) -> None:
    """Read the corpus, train with progress, and print a summary."""
    from cpcompile.cli.console import TrainProgress, console, print_result, stage_progress
    from cpcompile.core.paths import dense_path
    from cpcompile.pipeline.train import train_from_data
    from cpcompile.report import controls_table, summarize_training
    from cpcompile.training.branch import EVALUATION_TOKENS
    from cpcompile.training.trainer import planned_steps, work_path

    with (
        left_behind(lambda: _kept(work_path(out))),
        stage_progress() as stage,
        TrainProgress(planned_steps(train_config)) as progress,
    ):
        checkpoint = train_from_data(
            data,
            out,
            source,
            train_config,
            tokenizer=tokenizer,
            text_field=text_field,
            cache=cache,
            resume=resume,
            held_out=held_out,
            progress=stage,
            observer=progress,
        )
    print_result(controls_table(summarize_training(checkpoint.training, checkpoint.contexts)))
    if train_config.steps and train_config.held_out_tokens != EVALUATION_TOKENS:
        console.print(
            f"Perplexities during training were those of the first {EVALUATION_TOKENS:,} held-out tokens of each "
            "context, so they differ from the table."
        )
    console.print(f"wrote {out} and {dense_path(out)}, its dense baseline")


def _kept(work: Path) -> str:
    """What an interrupted training leaves."""
    if not work.exists():
        return STARTS_ANEW
    return f"{work} keeps what was done up to the last snapshot; resume with the same command and --resume"
