"""`cpcompile inspect` on a small bundle with every kind of engine: table, JSON, older, damaged and hostile bundles."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from cpcompile.bundle.reader import ROUTER
from cpcompile.bundle.writer import BundleWriter
from cpcompile.cli import main
from cpcompile.core.generation import GenerationSettings
from cpcompile.machine.gpu import NO_GPU, gpu_model
from cpcompile.text.tokenization import train_tokenizer
from tests.bundles import ARTIFACT, PLAN_INFO, reseal

CONTEXTS = ("de", "a-context-whose-name-is-much-longer-than-all-columns-of-a-terminal-leave")
MERGED = "cpu-fp32-merged"
COUNTS = {"total": 2_000_000, "kept": 500_000, "removed": 1_500_000, "removed_by_kind": {}, "removed_experts": {}}
GENERATION = GenerationSettings(end=(0, 151_645), context_length=8192, chat_template="\x1b[31m{{ messages }}")
Edit = Callable[[dict[str, Any]], object]


def graph() -> bytes:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    return onnx.helper.make_model(  # type: ignore[no-any-return]
        onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    ).SerializeToString()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with BundleWriter(tmp_path / "model.cpc") as writer:
        for name in ("weights", "whole", "trimmed"):
            writer.stage(name)
        (writer.root / ".weights" / "weights.bin").write_bytes(bytes(4_000_000))
        (writer.root / ".whole" / "tokenizer.json").write_text(train_tokenizer(["ab " * 50] * 9, 300).to_str())
        (writer.root / ".trimmed" / "tokenizer.json").write_text(train_tokenizer(["abc"], 257).to_str())
        np.save(writer.root / ".trimmed" / "token_ids.npy", np.arange(257, dtype=np.int32))
        weights, *tokenizers = (writer.add_asset(writer.root / name) for name in (".weights", ".whole", ".trimmed"))
        fp16 = {"variant": "cuda-fp16", "precision": "fp16", "provider": "CUDAExecutionProvider", "device": "cuda"}
        plan = {"variant": "tensorrt-rtx", "runtime": "tensorrt-rtx", "plan": PLAN_INFO, "model_file": "engine.plan"}
        engines = [(context, ARTIFACT) for context in CONTEXTS]
        engines += [(CONTEXTS[0], dataclasses.replace(ARTIFACT, **fp16))]
        engines += [(CONTEXTS[0], dataclasses.replace(ARTIFACT, files=("engine.plan",), **plan))]
        engines += [(ROUTER, dataclasses.replace(ARTIFACT, variant=MERGED, contexts=CONTEXTS))]
        for context, artifact in engines:
            (writer.folder(context, artifact.variant) / artifact.model_file).write_bytes(graph())
            writer.add_variant(context, artifact, weights=None if artifact.plan else weights)
        sizes = {"bytes_per_token": 3072, "dense_bytes_per_token": 6144}
        metadata = {
            "tokenizers": dict(zip(CONTEXTS, tokenizers, strict=True)),
            "generation": dict.fromkeys(CONTEXTS, GENERATION.to_plain()),
            "cache": dict.fromkeys(CONTEXTS, sizes),
            "parameters": dict.fromkeys(CONTEXTS, COUNTS),
            "shared_weights": True,
            "checkpoint": "c0ffee" * 10 + "0000",
        }
        writer.seal(name="test", metadata=metadata)
        return writer.commit()


def inspect(*arguments: object, columns: int = 80) -> Result:
    words = ["inspect", *map(str, arguments)]
    return CliRunner().invoke(main, words, env={"COLUMNS": str(columns)}, catch_exceptions=False)


def contents(bundle: Path, *options: str) -> dict[str, Any]:
    result = inspect(bundle, "--json", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def edit_ours(bundle: Path, edit: Edit) -> None:
    reseal(bundle, lambda manifest: edit(manifest["additional_metadata"]["cpcompile"]))


def test_the_json_says_everything(bundle: Path) -> None:
    """Scripts read it: a change of keys is a change of schema_version."""
    (bundle / "report.json").write_text('{"verdict": "pass"}')
    found = contents(bundle)
    files = json.loads((bundle / "manifest.json").read_text())["additional_metadata"]["cpcompile"]["files"]
    (weights,) = (name for name in files if name.endswith("weights.bin"))
    assert {key: found[key] for key in ("schema_version", "path", "name", "files", "verified", "verdict")} == {
        "schema_version": 1,
        "path": str(bundle),
        "name": "test",
        "files": len(files),
        "verified": False,
        "verdict": "pass",
    }
    assert found["checkpoint"] == "c0ffee" * 10 + "0000"
    assert found["weights"] == [{"file": weights, "bytes": 4_000_000, "sha256": files[weights]}]
    assert found["bytes"] == sum(path.stat().st_size for path in bundle.rglob("*.*") if path.name != "report.json")
    first, second = found["contexts"]
    assert first == {
        "name": "de",
        "parameters": 500_000,
        "dense_parameters": 2_000_000,
        "vocabulary": {"tokens": first["vocabulary"]["tokens"], "trimmed": False},
        "cache": {"bytes_per_token": 3072, "dense_bytes_per_token": 6144},
        "generation": GENERATION.to_plain(),
    }
    assert first["vocabulary"]["tokens"] > 257 and second["vocabulary"] == {"tokens": 257, "trimmed": True}
    engines = {(*each["contexts"], each["variant"]): each for each in found["engines"]}
    assert set(engines) == {
        ("de", "cpu-fp32"),
        (CONTEXTS[1], "cpu-fp32"),
        ("de", "cuda-fp16"),
        ("de", "tensorrt-rtx"),
        (*CONTEXTS, MERGED),
    }
    assert engines["de", "cpu-fp32"] == {
        "contexts": ["de"],
        "variant": "cpu-fp32",
        "runtime": "onnxruntime",
        "precision": "fp32",
        "provider": "CPUExecutionProvider",
        "bytes": len(graph()),
        "runs_here": True,
        "reason": None,
    }
    assert engines[(*CONTEXTS, MERGED)]["runs_here"]
    if gpu_model() is None:
        for variant in ("cuda-fp16", "tensorrt-rtx"):
            assert not engines["de", variant]["runs_here"] and engines["de", variant]["reason"] == NO_GPU


def test_the_table_fits_into_80_columns(bundle: Path) -> None:
    result = inspect(bundle)
    assert result.exit_code == 0
    table, _, _ = result.stdout.partition("Python:")
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    for word in ("500.0 k, 25 %", "257 trimmed", "3.1 kB, 50 %", "8,192", "151645", "yes", "tensorrt-rtx", "all"):
        assert word in table, table
    assert "sha256 c0ffeec0ffee" in table and "no readable report.json" in table
    assert "not compared with their digests" in table and "not recorded" not in table
    if gpu_model() is None:
        assert table.count("no (1)") == 2 and f"(1) {NO_GPU}" in table


def test_lines_to_copy_are_whole(bundle: Path) -> None:
    moved = bundle.with_name("a folder with a long name, so that a terminal would break the lines: model's.cpc")
    bundle.rename(moved)
    found, shown = contents(moved)["loading"], inspect(moved).stdout
    lines = [line for code in found.values() for line in code.splitlines()]
    assert len(lines) == 5 and all(f"  {line}\n" in shown for line in lines)
    assert found["command"] == f'cpcompile run {shlex.quote(str(moved))} --context de "Once upon a time"'
    compile(found["python"], "snippet", "exec")


def test_verify_compares_every_file(bundle: Path) -> None:
    assert contents(bundle, "--verify")["verified"]
    assert "all have the digests of the build" in inspect(bundle, "--verify").stdout
    (weights,) = bundle.rglob("weights.bin")
    with weights.open("r+b") as file:
        file.write(b"x")
    assert inspect(bundle).exit_code == 0
    result = inspect(bundle, "--verify")
    assert result.exit_code == 2 and "weights.bin: differs from what was built" in result.output


def test_a_bundle_from_before_says_what_it_does_not_record(bundle: Path) -> None:
    edit_ours(bundle, lambda ours: [ours.pop(key) for key in ("generation", "cache")])
    assert all(each["generation"] is each["cache"] is None for each in contents(bundle)["contexts"])
    said = "not recorded in this bundle: cache per token, context length, end ids, chat template"
    assert said in " ".join(inspect(bundle).stdout.split())


def test_a_model_that_reads_no_text(bundle: Path) -> None:
    edit_ours(bundle, lambda ours: ours.update(tokenizers={}, generation={}, cache={}))
    found = contents(bundle)
    assert all(each["vocabulary"] is None for each in found["contexts"])
    assert found["loading"]["command"] is None and "load_engine(" in found["loading"]["python"]
    shown = inspect(bundle).stdout
    assert "not recorded" not in shown and "Shell:" not in shown


def test_a_model_without_limits(bundle: Path) -> None:
    edit_ours(bundle, lambda ours: ours["generation"].update(de=GenerationSettings().to_plain()))
    assert re.search(r"^de .* no limit +none +no +$", inspect(bundle).stdout, re.MULTILINE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"verdict": "\\u001b[2J"}', '{"verdict": ["pass"]}', "[" * 100_000])
def test_a_report_that_cannot_be_read_has_no_verdict(bundle: Path, text: str) -> None:
    (bundle / "report.json").write_text(text)
    assert contents(bundle)["verdict"] is None
    assert "no readable report.json" in inspect(bundle).stdout


def test_a_report_that_is_a_pipe_is_not_waited_for(bundle: Path) -> None:
    os.mkfifo(bundle / "report.json")
    assert contents(bundle)["verdict"] is None


def test_nothing_of_a_stranger_reaches_the_terminal(bundle: Path) -> None:
    escape = "\x1b]0;title\x07\x1b[2J\u202e\r\n[bold]"

    def edit(manifest: dict[str, Any]) -> None:
        manifest["package_name"] = escape
        ours = manifest["additional_metadata"]["cpcompile"]
        ours["checkpoint"] = escape
        ours["files"] = {
            name: escape if name.endswith("weights.bin") else digest for name, digest in ours["files"].items()
        }

    reseal(bundle, edit)
    moved = bundle.with_name("\x1b[2J.cpc")
    bundle.rename(moved)
    for options in ([], ["--json"]):
        shown = inspect(moved, *options).stdout
        assert all(sign == "\n" or sign.isprintable() for sign in shown), repr(shown)
    assert inspect(moved, "--verify").exit_code == 2


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ("x", "string indices"),
        ({}, "bytes_per_token"),
        ({"bytes_per_token": 1.5, "dense_bytes_per_token": 2}, "float instead of int"),
        ({"bytes_per_token": -1, "dense_bytes_per_token": 2}, "cache of de"),
    ],
)
def test_caches_that_are_described_wrongly_are_refused(bundle: Path, sizes: object, says: str) -> None:
    edit_ours(bundle, lambda ours: ours["cache"].update(de=sizes))
    result = inspect(bundle)
    assert result.exit_code == 2 and "malformed" in result.output and says in result.output


def test_a_dense_model_without_a_cache_is_not_divided_by(bundle: Path) -> None:
    edit_ours(bundle, lambda ours: ours["cache"].update(de={"bytes_per_token": 0, "dense_bytes_per_token": 0}))
    assert inspect(bundle).exit_code == 0


@pytest.mark.parametrize("name", ["weights.bin", "tokenizer.json", "component.json", "manifest.json"])
def test_a_file_that_is_missing_is_a_sentence(bundle: Path, name: str) -> None:
    next(bundle.rglob(name)).unlink()
    result = inspect(bundle)
    assert result.exit_code == 2 and result.output.startswith("Error: ") and name in result.output


def test_a_tokenizer_that_is_none_is_a_sentence(bundle: Path) -> None:
    next(bundle.rglob("tokenizer.json")).write_text("{}")
    reseal(bundle)
    result = inspect(bundle)
    assert result.exit_code == 2 and "tokenizer.json: cannot be read" in result.output


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.pt", "give the one that `cpcompile build .*model.pt` writes"),
        ("model.pt2", "give the one that `cpcompile build .*model.pt2` writes"),
        ("model.onnx", "give the one that `cpcompile build` wrote"),
    ],
)
def test_a_file_is_no_bundle(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).touch()
    result = inspect(tmp_path / name)
    assert result.exit_code == 2
    assert re.search(f"is a file, and a bundle is a folder; {says}", result.output), result.output
