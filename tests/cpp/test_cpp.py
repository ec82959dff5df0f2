"""The C++ library does what Python does: the same refusals in the same words, the same logits, the same tokens.

`probe` does what it is asked for in JSON. It is built with the sanitizers of addresses and of undefined behaviour, and
again with that of threads for what runs in threads. What C++ needs is fetched or named by `building`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

from cpcompile.bundle.reader import open_bundle
from cpcompile.core.cache import PAST
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.passes.cache_interface import input_shapes
from cpcompile.runtime.engine import Engine, load_engine
from tests.bundles import reseal
from tests.cpp.building import build, genai, not_run, run
from tests.cpp.conftest import CONTEXTS
from tests.cpp.lines import lines

MODEL = "cpp/cpu-fp32/model.onnx"
MERGED = "cpu-fp32-merged"
GREEDY = {"max_new_tokens": 24, "stop_at_end": False}
PROMPTS = [[5, 77, 300, 12], [9], [400, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [1, 1]]
Job = dict[str, Any]
Probe = Callable[..., list[dict[str, Any]]]
ENVIRONMENT = {
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # ONNX Runtime's library is not built with the sanitizer, which would take for races what its threads agree on.
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


def ask(program: Path, jobs: list[Job], **environment: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [program], input=json.dumps(jobs), capture_output=True, text=True, env=os.environ | ENVIRONMENT | environment
    )
    assert done.returncode == 0, done.stderr[-6000:]
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.fixture(scope="session")
def probe() -> Probe:
    """probe(job, ...): what the C++ library answers, each with its result or its error."""
    program = build("asan", "probe") / "tests" / "cpp" / "probe"
    return lambda *jobs, **environment: ask(program, list(jobs), **environment)


def results(answers: list[dict[str, Any]]) -> list[Any]:
    """The results of jobs that have to succeed."""
    return [answer["result"] if "result" in answer else pytest.fail(answer["error"]) for answer in answers]


def python_error(bundle: Path, context: str, variant: str) -> tuple[str, str] | None:
    """What Python says when it opens, verifies and loads an engine."""
    try:
        opened = open_bundle(bundle)
        opened.verify_all()
        load_engine(opened, context, variant, threads=1)
    except UsageError as error:
        return "UsageError", str(error)
    except CpcompileError as error:
        return "Error", str(error)
    return None


def words(message: str) -> str:
    """A message without the part that another library phrases."""
    message = re.sub(r"cannot load it: .*", "cannot load it", message, flags=re.DOTALL)
    return re.sub(r"(malformed|as JSON|valid ONNX model|cannot be read) \(.*\)", r"\1 (…)", message, flags=re.DOTALL)


def compare_refusals(
    probe: Probe, bundles: list[Path], context: str = "cpp", variant: str = "cpu-fp32"
) -> list[tuple[Path, str | None]]:
    """Open each bundle in both languages; returns what Python said, after C++ was found to say the same."""
    answers = probe(
        *({"bundle": str(each), "verify": True, "context": context, "variant": variant} for each in bundles)
    )
    said = []
    for each, answer in zip(bundles, answers, strict=True):
        expected = python_error(each, context, variant)
        found = (answer["kind"], answer["error"]) if "error" in answer else None
        assert (expected is None) == (found is None), (each.name, expected, found)
        if expected and found:
            assert (found[0], words(found[1])) == (expected[0], words(expected[1])), each.name
        said.append((each, expected[1] if expected else None))
    return said


def edit_model(bundle: Path, edit: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(bundle / MODEL, load_external_data=False)
    edit(model)
    (bundle / MODEL).write_bytes(model.SerializeToString())
    reseal(bundle)


def external(key: str, value: str) -> Callable[[Path], None]:
    """Set an entry of the first tensor that lies in another file."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(each for each in model.graph.initializer if each.external_data)
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return lambda bundle: edit_model(bundle, edit)


def edit_component(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    component = bundle / "cpp" / "component.json"
    body = json.loads(component.read_text())
    edit(body["variants"]["cpu-fp32"])
    component.write_text(json.dumps(body))
    reseal(bundle)


def weights(bundle: Path) -> Path:
    """Those of the engines in float32."""
    return max(bundle.glob("shared_assets/*/weights.bin"), key=lambda path: path.stat().st_size)


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_link(path: Path) -> None:
    path.rename(path.parent.parent / f"moved-{path.name}")
    path.symlink_to(path.parent.parent / f"moved-{path.name}")


def ort(key: str, value: object) -> Callable[[Path], None]:
    return lambda bundle: edit_component(bundle, lambda body: body["executor_info"]["ort"].update({key: value}))


def files(name: str) -> Callable[[Path], None]:
    return lambda bundle: reseal(
        bundle, lambda manifest: manifest["additional_metadata"]["cpcompile"]["files"].update({name: "0" * 64})
    )


def text(content: str) -> Callable[[Path], object]:
    return lambda bundle: (bundle / "manifest.json").write_text(content, encoding="utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no such folder"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "is not a bundle"),
    "only a failed build": (lambda b: b.rename(f"{b}.failed"), "a build whose verdict is fail wrote"),
    "changed manifest": (lambda b: text((b / "manifest.json").read_text().replace('"model"', '"other"'))(b), "damaged"),
    "older version": (
        lambda b: reseal(b, lambda m: m["additional_metadata"]["cpcompile"].update(version=2)),
        "bundle version 2, this cpcompile reads 3 and 4",
    ),
    "changed model": (lambda b: (b / MODEL).write_bytes((b / MODEL).read_bytes() + b"\0"), "digest mismatch"),
    "missing model": (lambda b: (b / MODEL).unlink(), "is missing"),
    "changed weights": (lambda b: weights(b).write_bytes(b"x"), "digest mismatch"),
    "pointer of LFS": (lambda b: weights(b).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "pointer of annex": (lambda b: (b / "manifest.json").write_text("/annex/objects/SHA256"), "git annex get"),
    "pipe": (lambda b: to_pipe(b / MODEL), "is not a regular file"),
    "pipe for a component": (lambda b: to_pipe(b / "cpp" / "component.json"), "is not a regular file"),
    "pipe for the manifest": (lambda b: to_pipe(b / "manifest.json"), "is not a bundle"),
    "link to the manifest": (lambda b: to_link(b / "manifest.json"), "leaves the bundle"),
    "link to a context": (lambda b: to_link(b / "cpp"), "leaves the bundle"),
    "link to weights": (lambda b: to_link(b / "shared_assets"), "leaves the bundle"),
    "path upwards": (ort("model_file", "../../../secret.onnx"), "leaves the bundle"),
    "absolute path": (files("/etc/passwd"), "leaves the bundle"),
    "zero in a path": (files("a\0b"), "is not a valid path"),
    "long path": (files("x" * 5000), "cannot be read (File name too long)"),
    "listed file upwards": (files("a/../../secret"), "leaves the bundle"),
    "other suffix": (ort("model_file", "model.bin"), "malformed"),
    "option of a session": (ort("session_options", {"session.load_model_format": "ORT"}), "malformed"),
    "option of a library": (ort("session_options", {"session_options.register_custom_ops": "x.so"}), "malformed"),
    "option of a provider": (ort("provider_options", {"path": "x"}), "malformed"),
    "repeated key": (text('{"components": {}, "components": {}}'), "a key appears twice"),
    "not a number": (text('{"components": NaN}'), "as JSON"),
    "deep": (text("[" * 100_000), "as JSON"),
    "byte order mark": (text("\ufeff{}"), "as JSON"),
    "a list": (text("[]"), "malformed"),
    "nothing": (text(""), "as JSON"),
    "not UTF-8": (lambda b: (b / "manifest.json").write_bytes(b'{"\xff": 1}'), "as JSON"),
    "huge": (lambda b: os.truncate(b / "manifest.json", 10 << 30), "10,737,418,240 bytes"),
    "other file": (external("location", "../secret.bin"), "lies in '../secret.bin'"),
    "unnamed file": (external("location", ""), "is not named"),
    "beyond the weights": (external("length", str(10 << 30)), "needs the bytes up to"),
    "offset beyond": (external("offset", str(10 << 30)), "needs the bytes up to"),
    "negative offset": (external("offset", "-16"), "is '-16'"),
    "long number": (external("offset", "9" * 100), "64 bits"),
    "other dimensions": (
        lambda b: edit_model(b, lambda m: m.graph.initializer[1].dims.append(1 << 30)),
        "cannot load it",
    ),
    "truncated model": (
        lambda b: ((b / MODEL).write_bytes((b / MODEL).read_bytes()[:-9]), reseal(b)),
        "truncated",
    ),
    "empty model": (lambda b: ((b / MODEL).write_bytes(b""), reseal(b)), "is not a valid ONNX model"),
}


def test_every_kind_of_damage_is_refused_in_the_same_words(probe: Probe, bundle: Path, tmp_path: Path) -> None:
    damaged = []
    for name, (damage, _) in DAMAGE.items():
        copy = tmp_path / name.replace(" ", "-") / "model.cpc"
        shutil.copytree(bundle, copy, symlinks=True)
        damage(copy)
        damaged.append(copy)
    said = compare_refusals(probe, damaged)
    for (path, message), (_, expected) in zip(said, DAMAGE.values(), strict=True):
        assert message is not None, path
        assert expected in message, path


def leaves(tree: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every container and value in `tree`, once per kind of key."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def put(tree: Any, path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        tree = tree[key]
    if value is REMOVE:
        del tree[path[-1]]
    else:
        tree[path[-1]] = value


REMOVE = object()
GARBAGE = (None, 5, -1.5, True, "x", [], {}, [[1]], "\0", 1 << 40, REMOVE)


def test_both_languages_accept_and_refuse_the_same_manifests(probe: Probe, bundle: Path, tmp_path: Path) -> None:
    """Each value of a manifest and of a component, replaced by values of other kinds."""
    rng, copies = random.Random(3), []
    trees = {name: json.loads((bundle / name).read_text()) for name in ("cpp/component.json", "manifest.json")}
    places = [(name, path) for name, tree in trees.items() for path in leaves(tree) if path]
    for name, path in places:
        if {"by_name", "manifest_digest", "report.json"} & set(path):
            continue  # not read, or written anew
        for value in rng.sample(GARBAGE, 1 + name.startswith("cpp")):
            copy = tmp_path / str(len(copies))
            shutil.copytree(bundle, copy, copy_function=os.link)
            copies.append(copy)
            changed = json.loads(json.dumps(trees))
            put(changed[name], path, value)
            for each, tree in changed.items():
                (copy / each).unlink()
                (copy / each).write_text(json.dumps(tree))
            with contextlib.suppress(TypeError, KeyError, AttributeError):  # without a place for the digest
                reseal(copy)
    answers = probe(*({"bundle": str(copy), "verify": True} for copy in copies))
    refused = 0
    for copy, answer in zip(copies, answers, strict=True):
        try:
            open_bundle(copy).verify_all()
        except UsageError as error:
            assert answer.get("kind") == "UsageError", (copy, str(error), answer)
            refused += 1
        else:
            assert "result" in answer, (copy, answer)
    assert 50 < refused < len(copies)


def test_contexts_and_variants_that_do_not_exist(probe: Probe, bundle: Path) -> None:
    for context, variant, says in (
        ("de", "cpu-fp32", "no context 'de'; it has"),
        ("cpp", "gpu", "no variant 'gpu'; it has"),
    ):
        ((_, message),) = compare_refusals(probe, [bundle], context, variant)
        assert message is not None
        assert says in message


def test_engines_of_openvino_are_refused(probe: Probe, bundle: Path) -> None:
    (answer,) = probe({"bundle": str(bundle), "context": "cpp", "variant": "openvino-fp32"})
    assert answer["kind"] == "UsageError"
    assert answer["error"].endswith("is an engine of OpenVINO, which this library does not run; choose another variant")


def test_the_manifest_is_written_as_python_writes_it(probe: Probe) -> None:
    rng = random.Random(1)

    def value(depth: int) -> object:
        kind = rng.randrange(9 if depth else 7)
        if kind == 0:
            return "".join(
                chr(rng.choice([*range(0x20), 0x22, 0x5C, 0x7F, 0xE9, 0x20AC, 0x1F600, 65])) for _ in range(6)
            )
        if kind == 1:
            return rng.randrange(-(2**63), 2**63)
        if kind in (2, 3):
            return rng.choice([1e16, 1e15, 1e-4, 1e-5, 0.1, -0.0, 1.0, 123456.75, 5e-324, 1.7e308, rng.gauss(0, 1e10)])
        if kind < 7:
            return rng.choice([True, False, None, 0])
        if kind == 7:
            return [value(depth - 1) for _ in range(3)]
        return {str(value(0)): value(depth - 1) for _ in range(4)}

    values = [value(4) for _ in range(300)]
    answers = results(probe(*({"dumps": json.dumps(each)} for each in values)))
    assert answers == [json.dumps(each, sort_keys=True) for each in values]


def engines(bundle: Path) -> Iterator[tuple[str, str, Engine]]:
    for context in CONTEXTS:
        for variant in ("cpu-fp32", MERGED):
            yield context, variant, load_engine(bundle, context, variant, threads=1)


def test_logits_are_those_of_python(probe: Probe, bundle: Path) -> None:
    batch = np.random.default_rng(0).integers(512, size=(3, 12))
    for context, variant, engine in engines(bundle):
        job = {"bundle": str(bundle), "context": context, "variant": variant}
        whole, vocabulary = results(probe(job | {"run": batch.tolist()}, job))
        expected = engine.run(batch)
        np.testing.assert_allclose(np.array(whole), expected, atol=1e-5, rtol=1e-5)
        assert vocabulary == 512
        (steps,) = results(probe(job | {"step": batch.tolist(), "pieces": 3}))
        assert [each["length"] for each in steps] == [4, 8, 12]
        joined = np.concatenate([each["logits"] for each in steps], axis=1)
        np.testing.assert_allclose(joined, expected, atol=1e-4, rtol=1e-4)
        for each in steps:
            np.testing.assert_allclose(np.array(each["last"])[:, 0], np.array(each["logits"])[:, -1], atol=1e-5)


def test_greedy_tokens_are_those_of_python(probe: Probe, bundle: Path) -> None:
    """With and without a cache, alone and in a batch of prompts of different lengths."""
    prompts = PROMPTS + np.random.default_rng(4).integers(512, size=(3, 7)).tolist()
    for context, variant, engine in engines(bundle):
        expected = [list(engine.generate(prompt, tokens=24)) for prompt in prompts]
        job = {"bundle": str(bundle), "context": context, "variant": variant, **GREEDY}
        together, *alone = results(probe(*(job | {"generate": each} for each in [prompts, *([p] for p in prompts)])))
        assert together["texts"] == expected
        assert [each["texts"][0] for each in alone] == expected
        rows = [[token for row, token in together["seen"] if row == number] for number in range(len(prompts))]
        assert rows == expected  # what the callback saw


def test_caches_that_are_not_of_the_engine_are_refused(probe: Probe, bundle: Path) -> None:
    opened = open_bundle(bundle)
    graphs = {context: opened.variant(context, "cpu-fp32").graph().graph for context in opened.contexts}
    parts = {
        context: {name: shape for name, shape in input_shapes(graph).items() if PAST.fullmatch(name)}
        for context, graph in graphs.items()
    }
    context, other = next((a, b) for a in parts for b in parts if parts[a] and parts[a] != parts[b])
    (said,) = results(probe({"bundle": str(bundle), "context": context, "misuse": other}))
    *refused, kept = said
    assert kept == 2 and len(refused) == 3
    assert all("the cache is not of this engine" in each for each in refused)


def test_a_cache_grows_when_it_is_full(probe: Probe, bundle: Path) -> None:
    """It has room for 1,024 tokens beforehand."""
    context, _, engine = next(iter(engines(bundle)))
    job = {"bundle": str(bundle), "context": context, "max_new_tokens": 1040, "stop_at_end": False}
    ((text,),) = [each["texts"] for each in results(probe(job | {"generate": [PROMPTS[0]]}))]
    assert text == list(engine.generate(PROMPTS[0], tokens=1040))


def test_texts_end(probe: Probe, bundle: Path, tmp_path: Path) -> None:
    """At an id of the bundle, at one of the caller, at the length of the model, and when the callback says so."""
    job = {"bundle": str(bundle), "context": "cpp", "generate": PROMPTS}
    (whole,) = results(probe(job | GREEDY))
    end = whole["texts"][0][5]
    cut = [row[: row.index(end)] if end in row else row for row in whole["texts"]]
    assert len(cut[0]) <= 5
    limited = tmp_path / "model.cpc"
    shutil.copytree(bundle, limited)
    reseal(
        limited,
        lambda manifest: manifest["additional_metadata"]["cpcompile"]["generation"]["cpp"].update(
            end=[end], context_length=11
        ),
    )
    stopped, ended, few, unended, long = probe(
        job | GREEDY | {"stop": [end]},
        job | {"bundle": str(limited), "max_new_tokens": 24},
        job | GREEDY | {"stop_after": 6},
        job | GREEDY | {"bundle": str(limited)},
        job | {"bundle": str(limited), "generate": [[1] * 12]},
    )
    assert stopped["result"]["texts"] == cut
    room = [11 - len(prompt) for prompt in PROMPTS]
    assert ended["result"]["texts"] == [row[:count] for row, count in zip(cut, room, strict=True)]
    assert unended["result"]["texts"] == [row[:n] for row, n in zip(whole["texts"], room, strict=True)]
    assert few["result"]["seen"][:6] == whole["seen"][:6]
    assert len(few["result"]["seen"]) < len(whole["seen"])
    assert "the prompt has 12 tokens; cpp reads at most 11: shorten it" in long["error"]


def test_bundles_from_before_caches_were_recorded(probe: Probe, bundle: Path, tmp_path: Path) -> None:
    old = tmp_path / "model.cpc"
    shutil.copytree(bundle, old)
    for key in ("generation", "cache"):
        reseal(old, lambda manifest, key=key: manifest["additional_metadata"]["cpcompile"].pop(key))
    reseal(old, lambda manifest: manifest["additional_metadata"]["cpcompile"].update(version=3))
    job = {"context": "english", "variant": MERGED, "generate": PROMPTS, **GREEDY}
    before, now = results(probe(job | {"bundle": str(old)}, job | {"bundle": str(bundle)}))
    assert before == now


def test_best_is_what_the_build_chose(probe: Probe, bundle: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "model.cpc"
    shutil.copytree(bundle, chosen)
    job = {"bundle": str(chosen), "context": "english", "run": PROMPTS[:1]}
    for best, name in ((None, "cpu-fp32"), ("cpu-int8", "cpu-int8")):
        if best is not None:
            reseal(chosen, lambda m, best=best: m["additional_metadata"]["cpcompile"].update(best=best))
        own, given, unnamed = results(probe(job | {"variant": name}, job | {"variant": "best"}, job))
        assert own == given == unnamed and open_bundle(chosen).variant("english", "best").name == name
    for wrong, says in ((["cpu-int8"], "best"), ("cpu-int2", "has no variant 'cpu-int2'")):
        reseal(chosen, lambda m, wrong=wrong: m["additional_metadata"]["cpcompile"].update(best=wrong))
        (answer,) = probe(job)
        with pytest.raises(UsageError) as caught:
            open_bundle(chosen).variant("english", "best")
        assert says in answer["error"] == str(caught.value)


def test_wrong_input_is_refused_in_the_same_words(probe: Probe, bundle: Path) -> None:
    engine = load_engine(bundle, "cpp", threads=1)
    job = {"bundle": str(bundle), "context": "cpp"}
    wrong: tuple[list[list[int]], ...] = ([[]], [], [[1, 512]], [[-1]], [[1], [2, 3]])
    for ids, answer in zip(wrong, probe(*(job | {"run": ids} for ids in wrong)), strict=True):
        with pytest.raises(UsageError) as caught:
            engine.run(ids)
        if ids and ids[0] and len(ids) == 1:  # Python's shapes are those of numpy
            assert answer == {"kind": "UsageError", "error": str(caught.value)}
        assert answer["kind"] == "UsageError"
    settings = ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}, {"stop": [512]})
    *refused, empty = probe(*(job | {"generate": [[1]]} | each for each in settings), job | {"generate": [[1], []]})
    assert {answer["kind"] for answer in refused} == {"UsageError"}
    assert "the prompt is empty" in empty["error"]


def test_any_graph_runs_by_the_names_of_its_inputs(probe: Probe, bundle: Path, tmp_path: Path) -> None:
    """x + w, where w is a part of the shared weights."""
    copy = tmp_path / "model.cpc"
    shutil.copytree(bundle, copy)
    old = onnx.load(copy / MODEL, load_external_data=False)
    tensor = next(each for each in old.graph.initializer if each.external_data and list(each.dims) == [64])
    values = [onnx.helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, [64]) for each in ("x", "y")]
    add = onnx.helper.make_node("Add", ["x", tensor.name], ["y"])
    graph = onnx.helper.make_graph([add], "g", values[:1], values[1:], [tensor])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (copy / MODEL).write_bytes(model.SerializeToString())
    reseal(copy)
    job = {"bundle": str(copy), "context": "cpp"}
    x = list(range(64))
    found, unknown, missing, language = probe(
        job | {"outputs": {"x": x}}, job | {"outputs": {"z": x}}, job | {"outputs": {}}, job | {"run": [[1]]}
    )
    expected = load_engine(copy, "cpp", threads=1).outputs({"x": np.array(x, dtype=np.float32)})["y"]
    np.testing.assert_allclose(found["result"]["y"], expected, atol=1e-6)
    assert "has no input 'z'" in unknown["error"]
    assert "cannot run it on these inputs" in missing["error"]
    assert "is no language model, its inputs are x: use `outputs`" in language["error"]


def test_samples_follow_the_distribution(probe: Probe) -> None:
    logits = [2.0, 1.0, 0.0, -1.0, 1.0, -20.0]
    job = {"choose": logits, "count": 20000, "temperature": 0.8, "seed": 5}
    scores = np.array(logits) / 0.8
    for setting, kept in (
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 2}, [0, 1]),  # of equals the first
        ({"top_p": 0.7}, [0, 1]),
        ({"top_p": 0.01}, [0]),
        ({"top_k": 4, "top_p": 0.999}, [0, 1, 2, 4]),
    ):
        (chosen,) = results(probe(job | setting))
        expected = np.zeros(6)
        expected[kept] = np.exp(scores[kept]) / np.exp(scores[kept]).sum()
        frequencies = np.bincount(chosen, minlength=6) / len(chosen)
        assert set(np.flatnonzero(frequencies)) <= set(kept)
        np.testing.assert_allclose(frequencies, expected, atol=0.015)
    penalised, lone = results(
        probe(
            {"choose": logits, "count": 1, "before": [0, 0], "repetition_penalty": 3.0},
            {"choose": [-1.0, -1.5], "count": 1, "before": [0], "repetition_penalty": 2.0},
        )
    )
    assert (penalised, lone) == ([1], [1])


def test_a_seed_repeats_samples(probe: Probe, bundle: Path) -> None:
    job = {"bundle": str(bundle), "context": "python", "temperature": 1.0, **GREEDY}
    first, again, other, unseeded, batch = results(
        probe(
            job | {"generate": [[7, 8]], "seed": 3},
            job | {"generate": [[7, 8]], "seed": 3},
            job | {"generate": [[7, 8]], "seed": 4},
            job | {"generate": [[7, 8]]},
            job | {"generate": [[7, 8], [7, 8]], "seed": 3},
        )
    )
    assert first == again != other
    assert unseeded != first
    assert batch["texts"] == [first["texts"][0], other["texts"][0]]  # row r has the seed 3 + r


@pytest.mark.parametrize(("sanitizer", "requests"), [("asan", 300), ("tsan", 200)])
def test_threads_get_what_a_single_one_gets(bundle: Path, sanitizer: str, requests: int) -> None:
    """And memory stays what it was after the first requests, as far as the sanitizer does not keep it."""
    program = build(sanitizer, "probe") / "tests" / "cpp" / "probe"
    options = {"ASAN_OPTIONS": "quarantine_size_mb=0:thread_local_quarantine_size_kb=0"}
    (found,) = results(ask(program, [{"bundle": str(bundle), "requests": requests}], **options))
    assert found["wrong"] == 0
    if sanitizer == "asan":
        assert found["after"] <= found["before"] * 1.05


@pytest.fixture
def library() -> dict[str, str]:
    """The environment in which C++ finds the library that it needs for text."""
    if (path := genai()) is None:
        not_run("onnxruntime-genai is not installed, and CPCOMPILE_GENAI does not name its library")
    return {"CPCOMPILE_GENAI": str(path)}


def test_text_becomes_the_ids_of_tokenizers(probe: Probe, bundle: Path, library: dict[str, str]) -> None:
    """`python -m tests.cpp.compare_tokenizers 100000 model.cpc` compares more."""
    tokenizer = Tokenizer.from_file(str(open_bundle(bundle).tokenizer("cpp")))
    job = {"bundle": str(bundle), "context": "cpp"}
    texts = ["", "def f(x):\n    return x  # \U0001f600\n", *lines(1500)]
    refused = ["a\0b", "a\u0085b", "\ua7d1", "\U00031350"]
    (found,) = results(probe(job | {"encode": [*texts, *refused]}, **library))
    assert found[: len(texts)] == [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)]
    for text, reason in zip(refused, found[len(texts) :], strict=True):
        (sign,) = set(text) - set("ab")
        assert f"the text has the character U+{ord(sign):04X}, which" in reason


def test_text_of_ids_is_that_of_tokenizers(probe: Probe, bundle: Path) -> None:
    """Also of bytes that are no characters; in a stream, every piece is whole."""
    tokenizer = Tokenizer.from_file(str(open_bundle(bundle).tokenizer("cpp")))
    rng = random.Random(2)
    ids = [[rng.randrange(512) for _ in range(rng.randrange(30))] for _ in range(300)]
    ids += [tokenizer.encode(text).ids for text in lines(300, seed=1)]
    (found,) = results(probe({"bundle": str(bundle), "context": "cpp", "decode": ids}))
    expected = [tokenizer.decode(each) for each in ids]
    assert [each["text"] for each in found] == expected
    assert ["".join(each["pieces"]) for each in found] == expected


def test_a_bos_token_stands_in_front(probe: Probe, bundle: Path, tmp_path: Path, library: dict[str, str]) -> None:
    copy = shutil.copytree(bundle, tmp_path / "model.cpc")
    reseal(
        copy, lambda manifest: manifest["additional_metadata"]["cpcompile"]["generation"]["cpp"].update(leading=[3, 4])
    )
    job = {"context": "cpp", "encode": ["hello", ""]}
    with_it, without = results(probe(job | {"bundle": str(copy)}, job | {"bundle": str(bundle)}, **library))
    assert with_it == [[3, 4, *ids] for ids in without]


def edit_tokenizer(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    (path,) = bundle.glob("shared_assets/*/tokenizer.json")
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    reseal(bundle)


def test_tokenizers_that_genai_would_read_differently(
    probe: Probe, bundle: Path, tmp_path: Path, library: dict[str, str]
) -> None:
    """`Digits`, which it ignores, is rewritten; what cannot be written for it is refused."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    changes: dict[str, tuple[Callable[[dict[str, Any]], object], str | None]] = {
        "digits": (lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, byte_level]}), None),
        "normalizer": (lambda t: t.update(normalizer={"type": "NFC"}), "does not read the normalizer NFC as"),
        "prefix": (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "the setting add_prefix_space"),
        "unsplit": (lambda t: t["pre_tokenizer"].update(use_regex=False), "texts that are not split at all"),
        "words": (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "the pre-tokenizer Whitespace at the end"),
        "unmade": (lambda t: t["model"].update(merges=t["model"]["merges"][1:]), "which merges do not make"),
        "decoder": (lambda t: t.update(decoder=None), "its tokens are not bytes"),
    }
    jobs = []
    texts = ["x = 1234567 + 89", *lines(100, seed=5)]
    for name, (change, _) in changes.items():
        edit_tokenizer(shutil.copytree(bundle, tmp_path / name), change)
        jobs.append({"bundle": str(tmp_path / name), "context": "cpp", "encode": texts})
    for (name, (_, says)), answer in zip(changes.items(), probe(*jobs, **library), strict=True):
        if says is None:
            tokenizer = Tokenizer.from_file(str(open_bundle(tmp_path / name).tokenizer("cpp")))
            assert answer["result"] == [each.ids for each in tokenizer.encode_batch(texts)]
        else:
            assert says in str(answer.get("error", answer.get("result", [""])[0])), (name, str(answer)[:300])


def test_without_the_library_of_genai_text_is_refused(probe: Probe, bundle: Path) -> None:
    job = {"bundle": str(bundle), "context": "cpp", "encode": ["a"]}
    (answer,) = probe(job, CPCOMPILE_GENAI="/nowhere/libonnxruntime-genai.so")
    assert "text needs the library of ONNX Runtime GenAI, which cannot be opened" in answer["error"]


def test_the_examples_run(bundle: Path) -> None:
    targets = ("score", "generate", "generate_c", *(("genai",) if genai() else ()))
    examples = build("plain", *targets) / "examples" / "cpp"
    engine = load_engine(bundle, "cpp", threads=1)
    logits = engine.run([PROMPTS[0]])[0].astype(np.float64)
    likelihoods = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.mean([likelihoods[place, token] for place, token in enumerate(PROMPTS[0][1:])])
    assert float(run(examples / "score", bundle, "cpp", *PROMPTS[0])) == pytest.approx(loss, abs=1e-4)
    expected = list(engine.generate(PROMPTS[0], tokens=128))
    end = open_bundle(bundle).generation("cpp")
    assert end is not None
    stop = next((place for place, token in enumerate(expected) if token in end.end), None)
    assert [int(line) for line in run(examples / "generate_c", bundle, "cpp", *PROMPTS[0]).split()] == expected[:stop]
    refused = subprocess.run([examples / "generate_c", bundle, "de", "1"], capture_output=True, text=True)
    assert (refused.returncode, "has no context 'de'" in refused.stderr) == (2, True)
