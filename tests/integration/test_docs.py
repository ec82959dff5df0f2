"""Every command, snippet, name and link of README and documentation works.

The blocks of a page run in order, in a folder of its own with a corpus and small models in it. A block whose title is
in NOT_RUN is only parsed: its options exist, its files need not.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from cpcompile.cli import main
from cpcompile.cli.settings import load_toml
from cpcompile.core.config import CheckConfig, TrainConfig, override, preset
from cpcompile.targets.requests import parse_targets
from cpcompile.text.corpus import Corpus

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")

ROOT = Path(__file__).parents[2]
GUIDES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
"""Pages whose blocks are run; those of CONTRIBUTING belong to one example, see test_contributing."""
LINKED = [*GUIDES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
NOT_RUN = ("Needs an NVIDIA GPU", "Takes a while")
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
JUDGES = ("build", "validate", "check")
"""Commands that end with a verdict. After a few steps nothing is certain about quality; a verdict of fail is one."""
WRITES = {
    "README.md": ["model.cpc/report.json", "report.html", "english.onnx"],
    "docs/how-to/own-module.md": ["net.cpc/report.json"],
    "docs/how-to/optimize-onnx.md": ["smaller.onnx"],
    "docs/how-to/ci.md": ["base.json", "check.xml", "check.sarif"],
    "docs/how-to/compare-files.md": ["difference.html"],
}


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of every line, without comments."""
        lines = [shlex.split(line, comments=True) for line in self.text.splitlines()]
        return [words for words in lines if words]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "") -> list[Block]:
    found = [Block(*match.groups(default="")) for match in FENCE.finditer(read(page))]
    return [block for block in found if language in ("", block.language)]


def commands(page: str) -> list[list[str]]:
    return [words for block in blocks(page, "sh") for words in block.commands]


@pytest.fixture(scope="module")
def workspace(trained: Path, corpus: Corpus, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a checkpoint and its bundle, and a tiny model that stands for the pretrained one."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "corpus").symlink_to(corpus_folder)
    for name in ("model.pt", "model.dense.pt"):
        shutil.copy(trained.with_name(name), folder)
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_hidden_layers=2))
    model.save_pretrained(folder / "SmolLM2-135M")
    (folder / "SmolLM2-135M" / "tokenizer.json").write_text(corpus.tokenizer, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (
            "cpcompile build model.pt",
            "cpcompile train --data corpus/ --from-pretrained SmolLM2-135M/ --steps 0 --out smollm2.pt",
        ):
            run(shlex.split(line), patch, folder / "cache")
    return folder


def run(words: list[str], patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Run a line of a page in the current folder, with less work where it could take long."""
    patch.setenv("XDG_CACHE_HOME", str(cache))
    if words[0] == "cpcompile":
        run_cpcompile([*words[1:], *shorter(words)])
    elif words[0] == "make":
        require_success([*words, "--dry-run"], ROOT)
    elif words[0] == "pip":
        require_success(
            [sys.executable, "-m", *words, "--dry-run", "--no-deps", "--no-build-isolation"], ROOT, PIP_NO_INDEX="1"
        )
    elif words[0] == "pytest":
        words += ["--cpcompile-no-speed", "--cpcompile-no-memory"]
        require_success([sys.executable, "-m", *words], Path.cwd(), codes=(0, 1), XDG_CACHE_HOME=str(cache))
    else:
        raise AssertionError(f"no test knows how to run {words}")


def shorter(words: list[str]) -> list[str]:
    """Further options of a command."""
    given = {"train": ["--preset", "nano", "--steps", "4", "--batch", "1"], "compare": ["--rounds", "2"]}
    given |= {command: ["--no-speed", "--no-memory"] for command in ("build", "validate")}
    if "--from-pretrained" in words:
        return ["--sequence", "32", "--batch", "2", *(["--steps", "2"] if "--steps" not in words else [])]
    if words[1] == "check":
        return ["--no-speed", *(["--no-memory"] if not words[2].endswith(".onnx") else [])]
    return given.get(words[1], [])


def run_cpcompile(words: list[str]) -> None:
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    allowed = (0, 1) if words[0] in JUDGES else (0,)
    assert result.exit_code in allowed and "Error:" not in result.output, f"{words}: {result.output}"
    for failed in Path.cwd().glob("*.failed"):
        shutil.rmtree(failed.with_suffix(""), ignore_errors=True)
        failed.rename(failed.with_suffix(""))


def require_success(words: list[str], folder: Path, codes: tuple[int, ...] = (0,), **environment: str) -> None:
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode in codes and "Traceback" not in done.stderr, done.stdout + done.stderr


def parse(words: list[str]) -> None:
    """Options and arguments of a command that is not run."""
    if words[0] == "python":
        folder = ROOT / Path(words[1]).parent
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            module = runpy.run_path(str(ROOT / words[1]), run_name="parsed")
        (command,) = {value for value in module.values() if isinstance(value, click.Command)}
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                parameter.type = click.Path(path_type=Path)
    elif words[0] == "cpcompile":
        command = main.commands[words[1]]
    else:
        assert words[0] == "make", words
        require_success([*words, "--dry-run"], ROOT)
        return
    context = command.make_context(words[1], words[2:])
    if words[1] == "build":
        names = context.params["precisions"]
        parse_targets(context.params["targets"], names.split(",") if names else None, context.params["profiles"])


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page)])
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(workspace, tmp_path / "page", symlinks=True)
    monkeypatch.chdir(folder)
    for block in blocks(page):
        if block.title in NOT_RUN:
            for words in block.commands:
                parse(words)
        elif block.language == "sh":
            for words in block.commands:
                run(words, monkeypatch, workspace / "cache")
        elif block.language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(block.text, page, "exec"), {"__name__": "__main__"})
        elif block.language == "toml":
            (folder / block.title).write_text(block.text, encoding="utf-8")
        else:
            assert block.language == "text", f"{page}: no test knows how to run a block of {block.language}"
    for name in WRITES.get(page, []):
        assert (folder / name).is_file(), name


def test_the_readme_names_these_commands_and_no_others() -> None:
    assert [words[:2] for words in commands("README.md")] == [
        ["make", "demo"],
        ["make", "test"],
        ["pip", "install"],
        ["cpcompile", "train"],
        ["cpcompile", "estimate"],
        ["cpcompile", "build"],
        ["cpcompile", "validate"],
        ["cpcompile", "report"],
        ["cpcompile", "export"],
    ]


def test_every_command_is_shown_on_some_page() -> None:
    shown = {words[1] for page in GUIDES for words in commands(page) if words[0] == "cpcompile"}
    assert shown | {"demo"} == main.commands.keys()  # `make demo` runs it
    assert "cpcompile demo" in read("Makefile")


def test_every_pass_is_in_the_api_reference() -> None:
    from cpcompile.pipeline.optimize import PASSES

    for kind in PASSES.values():
        assert f"::: {kind.__module__}.{kind.__name__}\n" in read("docs/reference/api.md")


def test_every_benchmark_is_on_the_page_of_figures() -> None:
    page = " ".join(" ".join(words) for words in commands("docs/benchmarks.md"))
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert path.name == "common.py" or f"benchmarks/{path.name}" in page, path.name


def test_the_settings_of_the_documentation_are_settings(tmp_path: Path) -> None:
    (block,) = blocks("docs/reference/settings.md", "toml")
    (tmp_path / "settings.toml").write_text(block.text, encoding="utf-8")
    tables = load_toml(tmp_path / "settings.toml")
    assert override(preset("tiny"), tables["model"], where="model").layers == 6
    assert override(TrainConfig(), tables["train"], where="train").steps == 5000
    assert override(CheckConfig(), tables["check"], where="check") == CheckConfig()


@pytest.mark.parametrize("page", GUIDES)
def test_what_a_reference_names_exists(page: str) -> None:
    for name in re.findall(r"^::: (cpcompile\.\S+)$", read(page), flags=re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_to_files_and_headings(page: str) -> None:
    text = FENCE.sub("", read(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page}: {target}"


def test_the_navigation_has_every_page() -> None:
    navigation = re.findall(r"(\S+\.md)$", read("mkdocs.yml"), flags=re.MULTILINE)
    assert sorted(f"docs/{name}" for name in navigation) == [page for page in GUIDES if page.startswith("docs/")]
