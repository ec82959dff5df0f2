"""What callers may give to `open_bundle`, `load_engine` and an engine, and the sentence that they get otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcompile.bundle import Bundle, open_bundle
from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.runtime import Engine, load_engine
from tests.bundles import ARTIFACT

VOCABULARY = 16
LOGITS = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32)
"""The logits after each token."""
GRAPHS = {
    "text": """<ir_version: 10, opset_import: ["" : 20]>
        text (int64[batch, sequence] input_ids) => (float[batch, sequence, 16] logits)
        { logits = Gather(table, input_ids) }""",
    "classes": """<ir_version: 10, opset_import: ["" : 20]>
        classes (int64[batch, sequence] input_ids) => (float[batch, sequence, 2] logits)
        { both = Gather(table, input_ids) logits = Slice(both, zero, two, two) }""",
    "undefined": """<ir_version: 10, opset_import: ["" : 20]>
        undefined (int64[batch, sequence] input_ids) => (float[batch, sequence, 16] logits)
        { found = Gather(table, input_ids) none = Sub(found, found) logits = Div(none, none) }""",
    "numbers": """<ir_version: 10, opset_import: ["" : 20]>
        numbers (float[batch, 2] x, int32[1] n) => (float[batch, 2] y) { m = Cast<to = 1>(n) y = Mul(x, m) }""",
}


def write(folder: Path, *contexts: str, reads_text: bool) -> Bundle:
    with BundleWriter(folder / "model.cpc") as writer:
        for context in contexts:
            model = onnx.parser.parse_model(GRAPHS[context])
            if context != "numbers":
                constants = {"table": LOGITS} | {"zero": np.array([0]), "two": np.array([2])}
                used = {name for node in model.graph.node for name in node.input}
                arrays = [
                    onnx.numpy_helper.from_array(array, name) for name, array in constants.items() if name in used
                ]
                model.graph.initializer.extend(arrays)
            onnx.save(model, writer.folder(context, ARTIFACT.variant) / "model.onnx")
            writer.add_variant(context, ARTIFACT, weights=None)
        words = writer.root / "words"
        words.mkdir()
        (words / "tokenizer.json").write_text("{}")
        tokenizers = dict.fromkeys(contexts, writer.add_asset(words)) if reads_text else {}
        counts = {"total": 5, "kept": 3, "removed": 2, "removed_by_kind": {}, "removed_experts": {}}
        more = {"shared_weights": False, "parameters": dict.fromkeys(contexts, counts), "checkpoint": "0" * 64}
        writer.seal(name="test", metadata={"tokenizers": tokenizers} | more)
        return open_bundle(writer.commit())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write(tmp_path_factory.mktemp("bundle"), "text", reads_text=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write(tmp_path_factory.mktemp("program"), "numbers", "classes", reads_text=False)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Engine:
    return load_engine(bundle, "text")


@pytest.fixture(scope="module")
def numbers(program: Bundle) -> Engine:
    return load_engine(program, "numbers", threads=1)


def test_a_bundle_is_opened_by_text_or_path(bundle: Bundle) -> None:
    assert open_bundle(str(bundle.root)) == open_bundle(bundle.root) == bundle
    assert load_engine(str(bundle.root), "text").run([[1]]).shape == (1, 1, VOCABULARY)
    bundle.verify(str(bundle.root / "text" / "cpu-fp32" / "model.onnx"))


@pytest.mark.parametrize("path", [None, 3, b"model.cpc", ["model.cpc"]])
def test_what_is_no_path_is_named(path: Any) -> None:
    for opened in (lambda: open_bundle(path), lambda: load_engine(path, "text")):
        with pytest.raises(UsageError, match="is not a path; give a str or a pathlib.Path"):
            opened()


@pytest.mark.parametrize(
    "ids",
    [[[1, 2]], ((1, 2),), np.array([[1, 2]]), np.array([[1, 2]], dtype=np.uint8), np.array([[2, 1]])[:, ::-1]],
    ids=["lists", "tuples", "int64", "uint8", "a view"],
)
def test_token_ids_are_whatever_holds_whole_numbers(engine: Engine, ids: Any) -> None:
    assert np.array_equal(engine.run(ids), LOGITS[[[1, 2]]])
    assert np.array_equal(engine.outputs({"input_ids": ids})["logits"], LOGITS[[[1, 2]]])


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([1, 2], r"input_ids has the shape \(2,\); \(batch, sequence\) is needed"),
        ([[1], [1, 2]], "input_ids: cannot be made an array of int64"),
        ([[1.5]], "input_ids is float64; int64 is needed"),
        ([["a"]], "input_ids"),
        (None, "input_ids"),
        ([[2**64]], "input_ids"),
        ([[]], r"input_ids has the shape \(1, 0\) and holds no token"),
        (np.zeros((0, 3), dtype=np.int64), "holds no token"),
        ([[3, -5]], "input_ids has the token -5; those of text are 0 to 15"),
        ([[16, 2]], "input_ids has the token 16; those of text are 0 to 15"),
    ],
)
def test_other_token_ids_end_in_a_sentence(engine: Engine, ids: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        engine.run(ids)
    assert "ONNXRuntimeError" not in str(caught.value)


def test_outputs_takes_no_other_tokens_either(engine: Engine) -> None:
    with pytest.raises(UsageError, match="has the token -5; those of text are 0 to 15"):
        engine.outputs({"input_ids": [[-5]]})


def test_only_a_language_model_has_a_vocabulary(engine: Engine, program: Bundle) -> None:
    """The logits of a classifier say nothing about its tokens."""
    classifier = load_engine(program, "classes")
    assert (engine.vocabulary, classifier.vocabulary) == (VOCABULARY, None)
    assert np.array_equal(classifier.run([[15, 3]]), LOGITS[[[15, 3]], :2])


@given(ids=st.lists(st.lists(st.integers(-3, VOCABULARY + 2), max_size=3), max_size=3))
def test_random_token_ids_run_or_end_in_a_sentence(engine: Engine, ids: list[list[int]]) -> None:
    lengths = {len(row) for row in ids}
    if len(lengths) == 1 and lengths != {0} and all(0 <= token < VOCABULARY for row in ids for token in row):
        assert np.array_equal(engine.run(ids), LOGITS[np.array(ids)])
    else:
        with pytest.raises(UsageError, match="input_ids"):
            engine.run(ids)


def test_a_prompt_is_continued_greedily(engine: Engine) -> None:
    expected, last = [], 3
    for _ in range(5):
        last = int(LOGITS[last].argmax())
        expected.append(last)
    for prompt in ([1, 3], (1, 3), np.array([1, 3])):
        assert list(engine.generate(prompt, tokens=5)) == expected
    assert list(engine.generate([3], tokens=0)) == []


def test_samples_differ_unless_a_seed_is_given(engine: Engine) -> None:
    def sample(**seed: int) -> list[int]:
        return list(engine.generate([1], tokens=40, temperature=5.0, **seed))

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample() != sample()


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "the prompt is empty; give at least one token"),
        ("Return the ", {}, "the prompt is 'Return the '; token ids are needed"),
        (None, {}, "the prompt is None"),
        ([[1]], {}, r"the prompt is \[\[1\]\]; token ids"),
        ([1.0], {}, "token ids are needed"),
        ([-5], {}, "has the token -5; those of text are 0 to 15"),
        ([99], {}, "has the token 99"),
        ([1], {"temperature": -1.0}, "temperature is -1.0: it cannot be negative"),
        ([1], {"temperature": float("nan")}, "temperature is nan: a finite number"),
        ([1], {"temperature": "0.6"}, "temperature is '0.6': float is needed"),
        ([1], {"tokens": -1}, "tokens is -1: it cannot be negative"),
        ([1], {"tokens": 2.5}, "tokens is 2.5: int is needed"),
        ([1], {"seed": -1}, "seed is -1: it cannot be negative"),
        ([1], {"seed": "a"}, "seed is 'a': int is needed"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_at_once(
    engine: Engine, prompt: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        engine.generate(prompt, **{"tokens": 3} | options)


def test_logits_that_are_not_numbers_end_in_a_sentence(tmp_path: Path) -> None:
    undefined = load_engine(write(tmp_path, "undefined", reads_text=True), "undefined")
    for temperature in (0.0, 1.0):
        with pytest.raises(CpcompileError, match=r"the logits are not numbers \(NaN\)"):
            list(undefined.generate([1], tokens=3, temperature=temperature))


@pytest.mark.parametrize("threads", [-1, 1.5, "2", None])
def test_threads_are_a_whole_number(bundle: Bundle, threads: Any) -> None:
    with pytest.raises(UsageError, match="threads is"):
        load_engine(bundle, "text", threads=threads)


@pytest.mark.parametrize("variant", ["gone", [], {}, None, 3])
def test_another_variant_is_named_with_those_that_are(bundle: Bundle, variant: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"text has no variant {variant!r}; it has cpu-fp32")):
        load_engine(bundle, "text", variant)


def test_inputs_of_any_graph_are_given_by_name(numbers: Engine) -> None:
    found = numbers.outputs({"x": [[1, 2.5]], "n": [3]})
    assert found["y"].dtype == np.float32 and found["y"].tolist() == [[3.0, 7.5]]


@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        ({"x": [[1, 2]]}, "needs its inputs by name, x, n; given: x"),
        ({}, "given: nothing"),
        ([[1]], "given: list"),
        ({"x": [[1, 2]], "n": [1], "z": 1}, "given: x, n, z"),
        ({"x": [[1, 2]], "n": [2**40]}, "n is int64; int32 is needed"),
        ({"x": [[1, 2]], "n": [1.5]}, "n is float64; int32 is needed"),
        ({"x": [[1, 2, 3]], "n": [1]}, r"x has the shape \(1, 3\); \(batch, 2\) is needed"),
        ({"x": [[1j, 2]], "n": [1]}, "x is complex128; float32 is needed"),
        ({"x": [["a", "b"]], "n": [1]}, "x"),
    ],
)
def test_other_inputs_end_in_a_sentence(numbers: Engine, feeds: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        numbers.outputs(feeds)


def test_an_engine_that_reads_no_text_says_so(numbers: Engine) -> None:
    with pytest.raises(UsageError, match="is no language model, its inputs are x, n: use `outputs`"):
        numbers.run([[1]])
    with pytest.raises(CpcompileError, match="is no language model"):
        numbers.generate([1], tokens=1)


@pytest.mark.parametrize("ask", ["tokenizer", "token_ids", "variants"])
def test_a_context_that_is_not_there_is_named_with_those_that_are(program: Bundle, ask: str) -> None:
    with pytest.raises(UsageError, match="has no context 'german'; it has numbers, classes"):
        getattr(program, ask)("german")


def test_a_file_outside_of_the_bundle_is_not_verified(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lies outside of"):
        bundle.verify(tmp_path)
