"""What several test modules share: real text of this installation, and a nano model trained on it.

A model is trained once in a run, whichever worker of xdist needs it first; the others read its files.
"""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from cpcompile.core.config import ModelConfig, TrainConfig, preset
from cpcompile.text.corpus import Corpus, load_corpus
from cpcompile.text.installed_text import write_installed_corpus

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")  # a busy machine is no failure

MODEL = preset("nano")
TRAIN = TrainConfig(
    steps=24,
    sequence=32,
    batch=4,
    importance_sequences=8,
    held_out_tokens=1024,
    recalibrations=2,
    swap_fraction=0.3,
    snapshot_seconds=1e-6,
    controls=("one-mask", "small-dense"),
)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make): the folder that `make(folder)` fills, made by one worker of the run; nobody may change it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session", autouse=True)
def frozen_imports() -> None:
    """What the test modules imported stays: the collector, which the validator calls often, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests that compare runs bit by bit must not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_installed_corpus(tmp_path_factory.mktemp("text") / "corpus", bytes_per_context=150_000)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(corpus_folder: Path, cache: Path) -> Corpus:
    return load_corpus(
        corpus_folder,
        vocabulary=MODEL.vocabulary,
        sequence=TRAIN.sequence,
        held_out_fraction=TRAIN.held_out_fraction,
        seed=TRAIN.seed,
        cache=cache,
    )


@pytest.fixture(scope="session")
def model_config(corpus: Corpus) -> ModelConfig:
    assert corpus.vocabulary == MODEL.vocabulary
    return MODEL


@pytest.fixture(scope="session")
def trained(corpus: Corpus, model_config: ModelConfig, once: Once) -> Path:
    """model.pt of a whole run with two controls; model.dense.pt lies beside it."""
    from cpcompile.training.trainer import train

    return once("trained", lambda folder: train(corpus, model_config, TRAIN, folder / "model.pt")) / "model.pt"
