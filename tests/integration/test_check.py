"""`cpcompile check` on a trained nano model: what became worse fails and is named, also in CI's scripts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import xmlschema
import yaml
from click.testing import CliRunner, Result

from cpcompile.bundle.reader import open_bundle
from cpcompile.cli import main
from tests.bundles import reseal

ROOT = Path(__file__).parents[2]
CI = ROOT / "examples" / "ci"
QUICK = ("--no-speed", "--no-memory")
JUNIT = ROOT / "tests" / "data" / "junit-10.xsd"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def built(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt, model.cpc and base.json in a folder."""
    folder = shutil.copytree(measured, tmp_path_factory.mktemp("check") / "made")
    result = run("check", folder / "model.cpc", "--baseline", folder / "base.json", "--update-baseline", *QUICK)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def fewer(built: Path) -> Path:
    """A bundle of the first context alone."""
    bundle, (first, *_) = built / "fewer.cpc", open_bundle(built / "model.cpc").contexts
    assert run("build", built / "model.pt", "-o", bundle, "--contexts", first, *QUICK).exit_code in (0, 1)
    return bundle if bundle.exists() else bundle.with_name("fewer.cpc.failed")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder without cpcompile.toml, and not on GitHub."""
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    yield


def check(built: Path, *arguments: object, bundle: Path | None = None) -> tuple[int, dict[str, Any]]:
    """The exit code and what `--format json` says."""
    subject, model = bundle or built / "model.cpc", built / "model.pt"
    result = run(
        "check", subject, "--baseline", built / "base.json", "--model", model, "--format", "json", *QUICK, *arguments
    )
    return result.exit_code, json.loads(result.stdout)


def failures(found: dict[str, Any]) -> set[tuple[str | None, str]]:
    return {(each["context"], each["name"]) for each in found["outcomes"] if each["verdict"] == "fail"}


def test_nothing_changed(built: Path) -> None:
    code, found = check(built)
    assert (code, found["verdict"], failures(found)) == (0, "pass", set())
    assert {each["verdict"] for each in found["outcomes"]} == {"pass"}  # the baseline has neither speed nor memory


@pytest.mark.slow
def test_speed_and_memory_of_this_run(built: Path, fewer: Path, tmp_path: Path) -> None:
    """Measured for a baseline and for the check; on a busy machine a ratio may come out anyhow."""
    base = tmp_path / "base.json"
    (tmp_path / "cpcompile.toml").write_text("[check]\nrounds = 2\nattempts = 1\n")
    subject = ("check", fewer, "--baseline", base, "--model", built / "model.pt")
    assert run(*subject, "--update-baseline").exit_code == 0
    result = run(*subject, "--format", "json")
    assert result.exit_code in (0, 1, 3), result.output
    outcomes = [each for each in json.loads(result.stdout)["outcomes"] if each["variant"]]
    assert {each["name"] for each in outcomes} >= {"memory", "private_memory", "speed_ratio[1x128]"}
    for each in outcomes:
        if each["name"].startswith("speed_ratio"):
            assert each["change_low"] <= each["change"] <= each["change_high"]


@pytest.mark.slow
def test_an_engine_that_takes_twice_the_memory_fails(built: Path, fewer: Path, tmp_path: Path) -> None:
    """Its logits are the same: half a gigabyte is made, and a zero of it added."""
    base, greedy = tmp_path / "base.json", tmp_path / "greedy.cpc"
    arguments = ("--baseline", base, "--model", built / "model.pt", "--no-speed")
    updated = run("check", fewer, *arguments, "--update-baseline")
    assert (
        updated.exit_code == 0
        and "no check will judge speed_ratio: speed measurements were switched off" in updated.stderr
    )
    shutil.copytree(fewer, greedy)
    (context,) = open_bundle(greedy).contexts
    path = greedy / context / "cpu-fp32" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (ids,), (logits,) = model.graph.input, model.graph.output
    name = logits.name
    for node in model.graph.node:
        node.output[:] = ["raw" if each == name else each for each in node.output]
    for operator, inputs, output in (
        ("ReduceSum", [ids.name], "sum"),
        ("Cast", ["sum"], "number"),
        ("Expand", ["number", "shape"], "large"),
        ("Softmax", ["large"], "parts"),
        ("ReduceMin", ["parts"], "least"),
        ("Floor", ["least"], "zero"),
        ("Add", ["raw", "zero"], name),
    ):
        attributes = {"to": onnx.TensorProto.FLOAT} if operator == "Cast" else {}
        attributes |= {"keepdims": 0} if operator.startswith("Reduce") else {}
        model.graph.node.append(onnx.helper.make_node(operator, inputs, [output], **attributes))
    model.graph.initializer.append(onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [2], [1000, 60_000]))
    onnx.save(model, path)
    reseal(greedy)
    (tmp_path / "cpcompile.toml").write_text("[check]\nattempts = 1\nnodes.max_increase = 1.0\n")
    result = run("check", greedy, *arguments, "--format", "json")
    assert result.exit_code == 1, result.output
    assert failures(json.loads(result.stdout)) == {(context, "memory"), (context, "private_memory")}


def test_the_engine_of_another_context_fails(built: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "swapped.cpc"
    shutil.copytree(built / "model.cpc", swapped)
    first, second = open_bundle(swapped).contexts[:2]
    shutil.copy(swapped / second / "cpu-fp32" / "model.onnx", swapped / first / "cpu-fp32" / "model.onnx")
    reseal(swapped)
    code, found = check(built, bundle=swapped)
    assert code == 1
    assert (first, "parity") in failures(found) and second not in {context for context, _ in failures(found)}


def test_an_engine_with_more_nodes_and_weights_fails(built: Path, tmp_path: Path) -> None:
    grown = tmp_path / "grown.cpc"
    shutil.copytree(built / "model.cpc", grown)
    context = open_bundle(grown).contexts[0]
    path = grown / context / "cpu-fp32" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    logits = model.graph.output[0]
    name = logits.name
    for node in model.graph.node:
        node.output[:] = ["raw" if each == name else each for each in node.output]
    for step in range(40):  # too many for the runtime to be fused away: none of them is an identity
        source, target = ("raw" if not step else f"step{step - 1}"), (name if step == 39 else f"step{step}")
        model.graph.node.append(onnx.helper.make_node("Sin" if step % 2 else "Asin", [source], [target]))
    model.graph.initializer.append(onnx.helper.make_tensor("ballast", 1, [100_000], [1.0] * 100_000))
    onnx.save(model, path)
    reseal(grown)
    code, found = check(built, "--without-model", bundle=grown)
    assert code == 1
    assert failures(found) == {(context, "nodes"), (None, "bundle_bytes")}
    (nodes,) = [e for e in found["outcomes"] if (e["context"], e["name"]) == (context, "nodes")]
    assert "Asin (+20)" in nodes["sentence"] and "Sin (+20)" in nodes["sentence"]


def test_a_missing_context_fails(built: Path, fewer: Path) -> None:
    code, found = check(built, "--without-model", bundle=fewer)
    missing = open_bundle(built / "model.cpc").contexts[1:]
    assert code == 1 and {(context, "present") for context in missing} <= failures(found)


def test_limits_come_from_the_file_of_settings(built: Path, tmp_path: Path) -> None:
    plain = json.loads((built / "base.json").read_text())
    for place in plain["places"]:
        if "parameters" in place["values"]:
            place["values"]["parameters"]["value"] *= 0.8
    (tmp_path / "smaller.json").write_text(json.dumps(plain))
    arguments = ("check", built / "model.cpc", "--baseline", tmp_path / "smaller.json", "--without-model")
    result = run(*arguments)
    assert result.exit_code == 1 and "+25 %, allowed 0 %" in result.stdout, result.output
    (tmp_path / "cpcompile.toml").write_text("[check]\nparameters.max_increase = 0.3\n")
    assert run(*arguments).exit_code == 0
    (tmp_path / "other.toml").write_text("[check]\nparameters.max_decrease = 0.2\n")
    result = run(*arguments, "--config", tmp_path / "other.toml")
    assert result.exit_code == 2 and "there is no setting 'max_decrease'" in result.stderr


def test_what_cannot_be_done_is_a_sentence(built: Path, tmp_path: Path) -> None:
    bundle, base = built / "model.cpc", built / "base.json"
    for arguments, sentence in (
        ((bundle, "--baseline", tmp_path / "none.json"), "there is no such baseline; write it with"),
        ((bundle, "--baseline", base, "--format", "json", "--format", "table"), "would mix on standard output"),
        ((bundle, "--baseline", base, "--format", "xml"), "--format xml: give one of table, json"),
        ((bundle, "--baseline", base, "--format", "junit="), "--format junit=: give one of"),
        ((tmp_path / "none.cpc", "--baseline", base), "none.cpc"),
        ((tmp_path / "none.onnx", "--baseline", base), "base.json: is not a valid ONNX model"),
    ):
        result = run("check", *arguments)
        assert result.exit_code == 2 and sentence in result.stderr and "Traceback" not in result.output, result.output


def test_a_model_that_is_not_there_is_inconclusive(built: Path) -> None:
    code, found = check(built, "--model", "gone.pt")
    assert (code, found["verdict"]) == (3, "inconclusive")
    (parity, *_) = [each for each in found["outcomes"] if each["name"] == "parity"]
    assert parity["verdict"] == "not measured" and "gone.pt: there is no such file" in parity["sentence"]


def test_a_baseline_without_parity_is_only_written_on_request(built: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.json"
    arguments = ("check", built / "model.cpc", "--baseline", base, "--update-baseline")
    result = run(*arguments, "--model", "gone.pt")
    assert result.exit_code == 2 and "gone.pt: there is no such file" in result.stderr and not base.exists()
    result = run(*arguments, "--without-model")
    assert result.exit_code == 0 and "no check will judge parity" in result.stderr and base.exists()


def test_a_bundle_that_fails_is_no_baseline(built: Path, tmp_path: Path) -> None:
    swapped, base = tmp_path / "swapped.cpc", tmp_path / "base.json"
    shutil.copytree(built / "model.cpc", swapped)
    first, second = open_bundle(swapped).contexts[:2]
    shutil.copy(swapped / second / "cpu-fp32" / "model.onnx", swapped / first / "cpu-fp32" / "model.onnx")
    reseal(swapped)
    result = run("check", swapped, "--baseline", base, "--model", built / "model.pt", "--update-baseline", *QUICK)
    assert result.exit_code == 1 and "parity fails" in result.stderr
    assert not base.exists()


def test_github_gets_annotations_and_a_summary(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    result = run("check", built / "model.cpc", "--baseline", built / "base.json", "--without-model")
    assert result.exit_code == 0 and "::notice title=cpcompile check::" in result.stderr
    assert "check: pass" in result.stdout
    assert (tmp_path / "summary.md").read_text().startswith("### ✅ cpcompile check")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    result = run("check", built / "model.cpc", "--baseline", built / "base.json", "--without-model")
    assert result.exit_code == 0 and "no summary was written" in result.stderr


def test_an_onnx_file_against_an_older_one(built: Path, tmp_path: Path) -> None:
    contexts = open_bundle(built / "model.cpc").contexts
    for context in contexts[:2]:
        out = tmp_path / f"{context}.onnx"
        assert run("export", built / "model.cpc", context, "-o", out).exit_code == 0
    old, new = (tmp_path / f"{context}.onnx" for context in contexts[:2])
    assert run("check", old, "--baseline", old, "--no-speed").exit_code == 0
    result = run("check", new, "--baseline", old, "--no-speed", "--format", "json")
    assert result.exit_code == 1
    assert (None, "parity") in failures(json.loads(result.stdout))
    result = run("check", new, "--baseline", old, "--update-baseline")
    assert result.exit_code == 2 and "copy it to" in result.stderr


@pytest.mark.slow
def test_the_github_action_runs(built: Path, tmp_path: Path) -> None:
    """Its own script, with the variables that GitHub would set."""
    action = yaml.safe_load((CI / "cpcompile-check" / "action.yml").read_text())
    step = action["runs"]["steps"][-1]
    inputs = {name: each.get("default", "") for name, each in action["inputs"].items()} | {
        "bundle": str(built / "model.cpc"),
        "baseline": str(built / "base.json"),
        "model": str(built / "model.pt"),
        "arguments": "\n".join(QUICK),
        "results": "results of it",
    }
    names = {name: text.removeprefix("${{ inputs.").removesuffix(" }}") for name, text in step["env"].items()}
    done = _bash(step["run"], tmp_path, {name: inputs[given] for name, given in names.items()})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output").read_text() == "exit-code=0\n"
    assert (tmp_path / "summary.md").read_text().startswith("### ✅")
    xmlschema.validate(str(tmp_path / "results of it" / "check.xml"), str(JUNIT))
    assert json.loads((tmp_path / "results of it" / "check.sarif").read_text())["version"] == "2.1.0"
    for given, code in (("pass", 0), ("fail", 3)):
        changed = inputs | {"model": "gone.pt", "inconclusive": given}
        done = _bash(step["run"], tmp_path, {name: changed[value] for name, value in names.items()})
        assert done.returncode == code, done.stderr


@pytest.mark.slow
def test_the_workflow_uses_the_action_and_gitlab_runs(built: Path, tmp_path: Path) -> None:
    workflow = yaml.safe_load((CI / "github-workflow.yml").read_text())
    action = yaml.safe_load((CI / "cpcompile-check" / "action.yml").read_text())
    (given,) = [
        each["with"] for each in workflow["jobs"]["check"]["steps"] if "cpcompile-check" in each.get("uses", "")
    ]
    required = {name for name, each in action["inputs"].items() if each.get("required")}
    assert required <= given.keys() <= action["inputs"].keys()
    (job,) = yaml.safe_load((CI / "gitlab-ci.yml").read_text()).values()
    assert job["allow_failure"] == {"exit_codes": 3}
    for name in ("model.pt", "model.dense.pt", "base.json"):
        shutil.copy(built / name, tmp_path / name)
    shutil.copytree(built / "model.cpc", tmp_path / "model.cpc")
    (script,) = [line for line in job["script"] if line.startswith("cpcompile check")]
    done = _bash(f"{script} {' '.join(QUICK)}", tmp_path, {})
    assert done.returncode == 0, done.stderr
    xmlschema.validate(str(tmp_path / job["artifacts"]["reports"]["junit"]), str(JUNIT))


def _bash(script: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As GitHub runs a step: bash with -e and pipefail."""
    environment = os.environ | variables
    environment |= {"GITHUB_OUTPUT": str(folder / "output"), "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    (folder / "output").unlink(missing_ok=True)
    (folder / "summary.md").unlink(missing_ok=True)
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
