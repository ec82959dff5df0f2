"""`cpcompile demo`: the main job end to end on text that every installation has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from rich.panel import Panel
from rich.text import Text

from cpcompile.bundle.reader import Bundle, open_bundle
from cpcompile.cli.console import console, stage_progress
from cpcompile.core.config import BuildConfig, TrainConfig, ValidateConfig, preset
from cpcompile.pipeline.build import build_bundle
from cpcompile.report import Report
from cpcompile.runtime.engine import load_engine
from cpcompile.text.installed_text import write_installed_corpus
from cpcompile.text.tokenization import parse_tokenizer
from cpcompile.training.trainer import work_path

TRAIN = TrainConfig(
    steps=620,
    learning_rate=3e-3,
    # A million tokens train what all contexts share better than what each has for itself: contexts
    # differ in a quarter of their FFN budget, and share their heads.
    core_fractions={"ffn": 0.75, "head": 1.0},
    controls=("one-mask",),
)
PROMPTS = {
    "cpp": "namespace at {\n",
    "english": "Return the ",
    "python": "def __init__(self, ",
}


def run_demo(folder: Path, *, train: Callable[..., None], show: Callable[[Report], None]) -> Report:
    """Corpus, training, build and validation in `folder`; ends with samples and the path of the report.

    A demo that was interrupted goes on where it was.
    """
    corpus, model, bundle = folder / "corpus", folder / "model.pt", folder / "model.cpc"
    if not corpus.exists():
        with stage_progress() as stage:
            stage("collecting text of this installation", 0, None)
            partial = folder / "corpus.partial"
            shutil.rmtree(partial, ignore_errors=True)
            write_installed_corpus(partial).rename(corpus)
    train(
        corpus,
        model,
        preset("tiny"),
        TRAIN,
        tokenizer=None,
        text_field="text",
        cache=folder / "cache",
        resume=work_path(model).exists(),
        held_out=True,
    )
    with stage_progress() as stage:
        report, built = build_bundle(
            model,
            bundle,
            BuildConfig(),
            ValidateConfig(),
            progress=stage,
        )
    show(report)
    show_samples(open_bundle(built))
    console.print(f"report: {built / 'report.html'}")
    return report


def show_samples(bundle: Bundle) -> None:
    """A few lines that the engine of every context writes."""
    for context in bundle.contexts:
        tokenizer = parse_tokenizer(bundle.tokenizer(context).read_text(encoding="utf-8"))
        prompt = PROMPTS.get(context, "The ")
        engine = load_engine(bundle, context)
        ids = list(engine.generate(tokenizer.encode(prompt).ids, tokens=80, temperature=0.6))
        console.print(Panel(Text(prompt, style="bold").append(tokenizer.decode(ids), style="not bold"), title=context))
