"""`cpcompile train`: text -> checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cpcompile.core.config import ModelConfig, PretrainedConfig, TrainConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.types import Progress
from cpcompile.frontend.checkpoint import Checkpoint
from cpcompile.frontend.source import tokenizer_file
from cpcompile.partitioning.pretrained import read_pretrained
from cpcompile.text.corpus import load_corpus
from cpcompile.training.branch import Observer
from cpcompile.training.trainer import require_outputs, train


def train_from_data(
    data: Path,
    out: Path,
    source: ModelConfig | Path,
    config: TrainConfig,
    *,
    tokenizer: Path | None,
    text_field: str,
    cache: Path | None,
    resume: bool,
    held_out: bool,
    progress: Progress,
    observer: Observer,
) -> Checkpoint:
    """`cpcompile train`: text in `data` -> checkpoint `out`, and its dense baseline next to it.

    source: the shape of a model to train from scratch, or the folder of a pretrained one.
    """
    require_outputs(out)
    for folder in (data, *(data.iterdir() if data.is_dir() else ())):  # whose entries may be links
        if out.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{out}: lies in {folder}, where every file is text; choose another --out")
    pretrained = None
    model_config: ModelConfig | PretrainedConfig
    if isinstance(source, Path):
        progress("read the pretrained model", 0, 1)
        pretrained = read_pretrained(source)
        progress("read the pretrained model", 1, 1)
        model_config = pretrained.config
    else:
        model_config = source
    with tokenizer_file(pretrained.tokenizer if pretrained else None) as own_tokenizer:
        corpus = load_corpus(
            data,
            vocabulary=model_config.vocabulary,
            sequence=config.sequence,
            held_out_fraction=config.held_out_fraction,
            seed=config.seed,
            text_field=text_field,
            tokenizer=own_tokenizer or tokenizer,
            cache=cache,
            progress=progress,
        )
    if isinstance(model_config, ModelConfig):
        model_config = dataclasses.replace(model_config, vocabulary=corpus.vocabulary)
    return train(
        corpus,
        model_config,
        config,
        out,
        pretrained=pretrained.state if pretrained else None,
        resume=resume,
        held_out=held_out,
        observer=observer,
        progress=progress,
    )
