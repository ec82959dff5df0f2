"""Every command, snippet, name and link of README and documentation works.

The blocks of a page run in order, in a folder of its own with a corpus and small models in it. A block whose title is
in NOT_RUN is only parsed: its options exist, its files need not.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from cpcompile.cli import main
from cpcompile.cli.console import TrainProgress
from cpcompile.cli.settings import load_toml
from cpcompile.core.check_config import CheckConfig
from cpcompile.core.config import TrainConfig, ValidateConfig, preset
from cpcompile.core.overrides import override
from cpcompile.files.whole_files import file_digest
from cpcompile.pipeline.estimation import limit
from cpcompile.targets.requests import parse_targets
from cpcompile.text.corpus import Corpus
from cpcompile.training.branch import StepReport

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")

ROOT = Path(__file__).parents[2]
GUIDES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
"""Pages whose blocks are run; those of CONTRIBUTING belong to one example, see test_contributing."""
LINKED = [*GUIDES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
QUICK_PAGES = ("README.md", "docs/how-to/optimize-onnx.md")
"""The others train and build models of their own, and are left to `make test-all`."""
PAGES_ELSEWHERE = ("docs/how-to/embed-in-cpp.md",)
"""Run by tests/cpp/test_guide.py."""
NOT_RUN = ("Needs an NVIDIA GPU", "Takes a while")
ELSEWHERE = ("Needs the server",)
"""Titles of blocks that `test_examples` runs."""
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
QUICK = "[train]\nheld_out_tokens = 512\nimportance_sequences = 4\nsnapshot_seconds = 0.001\n"
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
def workspace(corpus: Corpus, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A corpus, a checkpoint and its bundle, and a tiny model that stands for the pretrained one."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "corpus").symlink_to(corpus_folder)
    (folder / "quick.toml").write_text(QUICK, encoding="utf-8")
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_hidden_layers=2))
    model.save_pretrained(folder / "SmolLM2-135M")
    (folder / "SmolLM2-135M" / "tokenizer.json").write_text(corpus.tokenizer, encoding="utf-8")
    made = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limit, "measure_libraries", functools.cache(limit.measure_libraries))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MADE", str(made))
        patch.chdir(folder)
        run(shlex.split("cpcompile train --data corpus/ --out model.pt"))
        run(shlex.split("cpcompile build model.pt -o model.cpc"))
        run(next(words for words in commands("docs/how-to/pretrained-model.md") if "smollm2.pt" in words))
        yield folder


def run(words: list[str]) -> None:
    """Run a line of a page in the current folder, with less work where it could take long."""
    if words[:2] == ["printf", "%s"] and words[3] == "|":
        run_cpcompile(words[5:], input=words[2])
    elif words[0] == "cpcompile":
        words = [*words[1:], *shorter(words)]
        if "--resume" in words:
            interrupt([word for word in words if word != "--resume"])
        make_once(words) if words[0] in ("train", "build") else run_cpcompile(words)
    elif words[0] == "make":
        require_success([*words, "--dry-run"], ROOT)
    elif words[0] == "pip":
        require_success([sys.executable, "-m", *words, "--dry-run", "--no-deps", "--no-build-isolation"], ROOT)
    elif words[0] == "pytest":
        words = [*words, "--cpcompile-no-speed", "--cpcompile-no-memory"]
        require_success([sys.executable, "-m", *words], Path.cwd(), codes=(0, 1))
    else:
        raise AssertionError(f"no test knows how to run {words}")


def shorter(words: list[str]) -> list[str]:
    """Further options of a command."""
    match words[1]:
        case "train":
            steps = ["--steps", "4"] if "--steps" not in words else []
            shape = ["--sequence", "32"] if "--from-pretrained" in words else ["--preset", "nano"]
            quick = ["--config", "quick.toml"] if "--config" not in words else []
            return [*steps, *shape, *quick, "--batch", "2"]
        case "build" | "validate":
            return ["--no-speed", "--no-memory", "--no-layers"]
        case "check":
            return ["--no-speed", "--no-memory"]
        case "compare":
            return ["--rounds", "2"]
    return []


def make_once(words: list[str]) -> None:
    """Run a command, or bring what the same command has made of the same files before."""
    written = words[words.index("--out") + 1] if "--out" in words else None
    given = [file_digest(Path(word)) for word in words if word != written and Path(word).is_file()]
    made = Path(os.environ["MADE"]) / hashlib.sha256(repr((words, given)).encode()).hexdigest()
    here = Path.cwd()
    if not made.exists():
        before = {path: path.stat().st_mtime_ns for path in here.iterdir()}
        run_cpcompile(words)
        made.mkdir()
        new = [path for path in here.iterdir() if before.get(path) != path.stat().st_mtime_ns]
        source, target = new, made
    else:
        source, target = list(made.iterdir()), here
    for path in source:
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy(path, target)


def interrupt(words: list[str]) -> None:
    """Press Ctrl-C while a training is at work, after it has saved what it did."""

    def progress(_: TrainProgress, report: StepReport) -> None:
        if report.step > 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainProgress, "__call__", progress)
        result = CliRunner().invoke(main, words)
    assert result.exit_code == 130 and "--resume" in result.output, result.output


def run_cpcompile(words: list[str], input: str | None = None) -> None:
    result = CliRunner().invoke(main, words, catch_exceptions=False, input=input)
    allowed = (0, 1) if words[0] in JUDGES else (0,)
    assert result.exit_code in allowed and "Error:" not in result.output, f"{words}: {result.output}"
    for failed in Path.cwd().glob("*.failed"):
        shutil.rmtree(failed.with_suffix(""), ignore_errors=True)
        failed.rename(failed.with_suffix(""))


def require_success(words: list[str], folder: Path, codes: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
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


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page in QUICK_PAGES else pytest.mark.slow)
        for page in GUIDES
        if blocks(page) and page not in PAGES_ELSEWHERE
    ],
)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(workspace, tmp_path / "page", symlinks=True)
    monkeypatch.chdir(folder)
    for block in blocks(page):
        if block.title in ELSEWHERE:
            continue
        if block.title in NOT_RUN:
            for words in block.commands:
                parse(words)
        elif block.language == "sh":
            for words in block.commands:
                run(words)
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
        ["cpcompile", "run"],
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
    commands_there = [path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text("utf-8")]
    assert commands_there
    for path in commands_there:
        assert f"benchmarks/{path.name}" in page, path.name


def test_the_settings_of_the_documentation_are_settings(tmp_path: Path) -> None:
    (block,) = blocks("docs/reference/settings.md", "toml")
    (tmp_path / "settings.toml").write_text(block.text, encoding="utf-8")
    tables = load_toml(tmp_path / "settings.toml")
    assert override(preset("tiny"), tables["model"], where="model").layers == 6
    assert override(TrainConfig(), tables["train"], where="train").steps == 5000
    assert override(CheckConfig(), tables["check"], where="check") == CheckConfig()
    validation = override(ValidateConfig(), tables["validate"], where="validate")
    assert (validation.max_perplexity_increase, validation.speed_shapes) == (0.05, ((1, 128), (8, 256)))


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
