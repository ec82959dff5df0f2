"""`cpcompile export` into folders that other programs run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime_genai as og
import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer

from cpcompile.bundle import open_bundle
from cpcompile.cli import main
from cpcompile.runtime import load_engine
from cpcompile.runtime.engine import Engine, create_session, session_options
from tests.bundles import reseal, whole_text_graph
from tests.conftest import Once
from tests.unit.exporters.genai import assert_likeliest, generate

PROMPTS = ("def f(x):\n    return ", "The ", "#include <")
TOKENS = 32


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trimmed(trained: Path, once: Once) -> Path:
    """A bundle whose contexts have vocabularies of their own."""

    def make(folder: Path) -> None:
        flags = ("--vocabulary-coverage", 0.95, "--no-speed", "--no-memory", "--no-layers")
        result = run("build", trained, "-o", folder / "model.cpc", *flags)
        assert result.exit_code in (0, 1), result.output
        if (failed := folder / "model.cpc.failed").exists():
            failed.rename(folder / "model.cpc")

    return once("trimmed", make) / "model.cpc"


@pytest.mark.parametrize("kind", ["whole", pytest.param("trimmed", marks=pytest.mark.slow)])
def test_genai_generates_what_our_engines_generate(
    kind: str, measured: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = measured / "model.cpc" if kind == "whole" else request.getfixturevalue("trimmed")
    out = tmp_path / "genai"
    result = run("export", bundle, "english,python", "--format", "genai", "-o", out)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"english", "python", "weights.bin"}
    for context in ("english", "python"):
        engine, model = load_engine(bundle, context), og.Model(str(out / context))
        ours, theirs = Tokenizer.from_file(str(open_bundle(bundle).tokenizer(context))), og.Tokenizer(model)
        (end,) = json.loads((out / context / "genai_config.json").read_text())["model"]["eos_token_id"]
        for text in PROMPTS:
            ids = theirs.encode(text).tolist()
            assert ids == ours.encode(text).ids
            (got,) = generate(model, [ids], TOKENS)
            expected = list(engine.generate(ids, tokens=TOKENS))
            assert got == expected[: expected.index(end) if end in expected else TOKENS]
            assert_likeliest(ids, got, lambda given, engine=engine: engine.run([given])[0, -1])


def test_what_exists_is_kept(measured: Path, tmp_path: Path) -> None:
    out, bundle = tmp_path / "out", measured / "model.cpc"
    out.mkdir()
    command = ("export", bundle, "english", "--format", "genai", "-o", out)
    assert run(*command).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(*command)
    assert again.exit_code == 2 and "exists, so it is kept; remove it or choose another --out" in again.output
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]
    assert "tokenizer_config.json" in {path.name for path in before}


def test_without_its_tokenizer_the_folder_has_that_of_the_bundle(measured: Path, tmp_path: Path) -> None:
    bundle = measured / "model.cpc"
    result = run("export", bundle, "english", "--format", "genai", "--no-tokenizer", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    original = open_bundle(bundle).tokenizer("english").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == original
    model = og.Model(str(tmp_path / "out"))
    assert generate(model, [[5, 6]], 3)
    with pytest.raises(RuntimeError, match="tokenizer_config.json"):
        og.Tokenizer(model)


def test_an_engine_without_a_cache_is_refused(measured: Path, tmp_path: Path) -> None:
    """As built before engines had one."""
    old = shutil.copytree(measured / "model.cpc", tmp_path / "old.cpc")
    ir.save(whole_text_graph(measured / "model.pt", "english"), open_bundle(old).variant("english", "cpu-fp32").model)
    reseal(old, lambda manifest: manifest["additional_metadata"]["cpcompile"].pop("generation"))
    assert load_engine(old, "english").run(np.array([[1, 2, 3]])).shape == (1, 3, 512)
    result = run("export", old, "english", "--format", "genai", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "build the bundle again" in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists()


def test_triton_gets_a_model_for_each_context(measured: Path, tmp_path: Path) -> None:
    """The engine as it is in the bundle; that Triton runs it is not tested."""
    bundle, out = measured / "model.cpc", tmp_path / "repository"
    result = run("export", bundle, "english,python", "--format", "triton", "-o", out)
    assert result.exit_code == 0, result.output
    for context in ("english", "python"):
        (model,) = (out / context).rglob("*.onnx")
        assert model.relative_to(out / context).as_posix() == "1/model.onnx"
        assert f'name: "{context}"' in (out / context / "config.pbtxt").read_text()
        variant = replace(open_bundle(bundle).variant(context, "cpu-fp32"), model=model, weights=None)
        alone = Engine(variant, create_session(variant, session_options(variant, threads=1)), 512)
        assert np.array_equal(alone.run([[1, 2, 3]]), load_engine(bundle, context, threads=1).run([[1, 2, 3]]))


def test_errors_name_the_option(measured: Path, tmp_path: Path) -> None:
    bundle = measured / "model.cpc"
    cases = {
        ("english,python", "-o", tmp_path / "x.onnx"): "writes one file of one context; export them one by one",
        ("english", "--format", "genai"): "writes a folder; name it with --out",
        ("english", "--no-tokenizer"): "--no-tokenizer belongs to --format genai",
        ("klingon", "--format", "genai", "-o", tmp_path / "x"): "no context 'klingon'",
        ("english", "--format", "genai", "-o", bundle / "x"): "lies in the bundle",
    }
    for arguments, message in cases.items():
        result = run("export", bundle, *arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), (arguments, result.output)
    assert not list(tmp_path.iterdir())
