"""Every command and every Python block of the README runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpcompile.cli.settings import load_toml
from cpcompile.core.config import CheckConfig, TrainConfig, override, preset
from cpcompile.text.corpus import Corpus

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(trained: Path, corpus: Corpus, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's commands run: a corpus, and a tiny model that stands for the pretrained one."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "corpus").symlink_to(corpus_folder)
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_hidden_layers=2))
    model.save_pretrained(folder / "SmolLM2-135M")
    (folder / "SmolLM2-135M" / "tokenizer.json").write_text(corpus.tokenizer, encoding="utf-8")
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


def test_the_readme_names_these_commands_and_no_others() -> None:
    """A command that is added has to be added to a test."""
    assert [command.split()[:2] for command in commands()] == [
        ["make", "demo"],
        ["make", "test"],
        ["pip", "install"],
        ["cpcompile", "train"],
        ["cpcompile", "estimate"],
        ["cpcompile", "build"],
        ["cpcompile", "validate"],
        ["cpcompile", "report"],
        ["cpcompile", "export"],
        ["cpcompile", "train"],
        ["cpcompile", "build"],
        ["cpcompile", "build"],
        ["cpcompile", "build"],
        ["cpcompile", "opt"],
        ["cpcompile", "compare"],
        ["cpcompile", "passes"],
        ["cpcompile", "check"],
        ["cpcompile", "check"],
        ["pytest", "--cpcompile"],
        ["cpcompile", "doctor"],
    ]


def test_make_knows_its_targets() -> None:
    for command in commands()[:2]:
        done = run(ROOT, *command.split(), "--dry-run")
        assert done.returncode == 0, done.stderr


def test_the_extra_of_the_readme_resolves() -> None:
    done = run(ROOT, sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation", ".[cpu]")
    assert done.returncode == 0, done.stderr


def test_the_settings_of_the_readme_are_settings(folder: Path) -> None:
    (settings,) = blocks("toml")
    (folder / "settings.toml").write_text(settings, encoding="utf-8")
    tables = load_toml(folder / "settings.toml")
    assert override(preset("tiny"), tables["model"], where="model").layers == 6
    assert override(TrainConfig(), tables["train"], where="train").steps == 5000
    assert override(CheckConfig(), tables["check"], where="check") == CheckConfig()


def test_the_commands_run_one_after_the_other(folder: Path) -> None:
    (own_module,) = (block for block in blocks("python") if "save_program" in block)
    done = run(folder, sys.executable, "-c", own_module)
    assert done.returncode == 0, done.stderr
    for command in commands()[3:]:
        words = command.split()
        if "--from-pretrained" in words:
            words += ["--sequence", "32", "--batch", "2"]
        elif words[1] == "train":
            words += ["--preset", "nano", "--steps", "4", "--batch", "1"]
        if words[1] in ("validate", "compare"):
            words += ["--rounds", "2"]
        if words[1] in ("build", "check"):
            words += ["--no-speed", "--no-memory"]
        if words[0] == "pytest":
            words += ["--cpcompile-no-speed", "--cpcompile-no-memory"]
        done = run(folder, sys.executable, "-m", *words)
        # After four steps nothing is certain about quality; a verdict of fail is one.
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
        failed = folder / "model.cpc.failed"
        if failed.exists():
            shutil.move(failed, folder / "model.cpc")
    assert (folder / "net.cpc" / "report.json").is_file()
    assert (folder / "report.html").is_file()
    assert (folder / "english.onnx").is_file()
    assert (folder / "smaller.onnx").is_file()
    assert (folder / "base.json").is_file() and (folder / "check.xml").is_file() and (folder / "check.sarif").is_file()
    for block in blocks("python"):
        done = run(folder, sys.executable, "-c", block)
        assert done.returncode == 0, done.stderr
