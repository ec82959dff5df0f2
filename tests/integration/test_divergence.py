"""A wrong engine in a bundle: `cpcompile validate` names the node and writes its repro; a sound engine has none."""

import json
import shutil
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from cpcompile.bundle.manifest import manifest_digest
from cpcompile.bundle.reader import Bundle, open_bundle
from cpcompile.cli import main
from cpcompile.files.whole_files import file_digest
from cpcompile.frontend.source import open_source
from cpcompile.report import SCHEMA
from cpcompile.validation.divergence import engine_graph, find_divergence
from cpcompile.validation.expected_graphs import FreshGraphs

FAST = ["--no-speed", "--no-memory"]
FAULTY = "layers.1.ffn.down.weight"


@pytest.fixture(scope="module")
def bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One context with a vocabulary of its own; the model lies beside it."""
    folder = tmp_path_factory.mktemp("divergence")
    for name in ("model.pt", "model.dense.pt"):
        shutil.copy(trained.with_name(name), folder / name)
    command = ["build", str(folder / "model.pt"), "--contexts", "english", "--vocabulary-coverage", "0.9", *FAST]
    result = CliRunner().invoke(main, command)
    assert result.exit_code in (0, 1), result.output
    (built,) = folder.glob("model.cpc*")
    return open_bundle(built.rename(folder / "model.cpc"))


def test_a_sound_engine_is_what_the_model_freezes_to(bundle: Bundle) -> None:
    source = open_source(bundle.root.with_name("model.pt"))
    tokens = {"english": bundle.token_ids("english")}
    graphs = FreshGraphs(source, cache(lambda opset: source.capture(opset=opset)), tokens)
    engine = engine_graph(bundle.variant("english", "cpu-fp32"))
    feeds = {"input_ids": np.random.default_rng(0).integers(0, len(tokens["english"]), (2, 9))}
    assert find_divergence(graphs.frozen("english", 23), engine, feeds) is None
    assert find_divergence(graphs.bound("english", 23), engine, feeds, sliced=True) is None


def test_a_perturbed_weight_is_named_in_the_report(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "model.cpc"
    shutil.copytree(bundle.root, folder)
    for name, value in engine_graph(bundle.variant("english", "cpu-fp32")).graph.initializers.items():
        if name.startswith(FAULTY):
            assert isinstance(value.const_value, ir.ExternalTensor)
            path = folder / Path(value.const_value.path).relative_to(bundle.root)
            weights = np.memmap(
                path, np.float32, "r+", value.const_value.offset or 0, tuple(value.const_value.shape.numpy())
            )
            weights *= 1 + 1e-3 * np.random.default_rng(0).standard_normal(weights.shape).astype(np.float32)
            weights.flush()
    manifest = json.loads((folder / "manifest.json").read_text())
    metadata = manifest["additional_metadata"]["cpcompile"]
    metadata["files"][path.relative_to(folder).as_posix()] = file_digest(path)
    metadata["manifest_digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))

    model, repro = bundle.root.with_name("model.pt"), tmp_path / "repro"
    command = ["validate", str(folder), "--model", str(model), *FAST, "--json", "--repro", str(repro)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    (variant,) = report["contexts"][0]["variants"]
    assert variant["parity"]["verdict"] == "fail"
    found = variant["divergence"]
    assert (found["operator"], found["module"]) == ("MatMul", "layers.1.ffn")
    assert found["max_abs_error"] > found["tolerance"] and found["not_measured"] == {}
    assert found["repro"] == str(repro / "english-cpu-fp32") and (repro / "english-cpu-fp32").is_dir()
    assert any(found["sentence"] in reason and found["repro"] in reason for reason in report["reasons"])
    errors = {layer["module"]: layer["max_abs_error"] for layer in found["layers"]}
    assert errors["layers.0"] < found["tolerance"] < errors["layers.1"]


@pytest.mark.slow
def test_a_model_without_numbers_is_not_blamed_on_the_engine(trained: Path, tmp_path: Path) -> None:
    plain = torch.load(trained, weights_only=True)
    plain["state"]["layers.0.ffn.down.weight"][0, 0] = float("nan")
    torch.save(plain, tmp_path / "model.pt")
    shutil.copy(trained.with_name("model.dense.pt"), tmp_path)
    command = ["build", str(tmp_path / "model.pt"), "--contexts", "english", *FAST, "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1, result.output
    (variant,) = json.loads(result.stdout)["contexts"][0]["variants"]
    assert "of the eager model are NaN" in variant["parity"]["reason"]
    assert "the eager model itself computes NaN or infinity" in variant["divergence"]["not_measured"]["sentence"]
