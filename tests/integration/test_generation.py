"""Text from a bundle: the tokens of the eager model, one by one and in batches, one context and many; and `run`."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from cpcompile.bundle.reader import open_bundle
from cpcompile.cli import main
from cpcompile.cli.build import warn_without_cache
from cpcompile.core.errors import UsageError
from cpcompile.core.generation import GenerationSettings
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.runtime import Engines, TextEngine, load, load_all
from tests.bundles import reseal, whole_text_graph

PROMPTS = ("Return the ", "import numpy as np\n\n\ndef main(", "x", "größer als 漢字 🙂")
TOLERANCE = 1e-4
"""Of logits: two tokens whose logits differ by less may change places."""


@pytest.fixture(scope="module")
def bundle(measured: Path) -> Path:
    return measured / "model.cpc"


@pytest.fixture(scope="module")
def engine(bundle: Path) -> TextEngine:
    return load(bundle, "python")


def test_greedy_tokens_are_those_of_the_eager_model(bundle: Path, measured: Path) -> None:
    checkpoint = load_checkpoint(measured / "model.pt")
    for index, context in enumerate(checkpoint.contexts):
        engine = load(bundle, context)
        prompts = [engine.encode(prompt) for prompt in PROMPTS]
        alone = [engine.generate(ids, max_new_tokens=24) for ids in prompts]
        for ids, new in zip(prompts, alone, strict=True):
            assert len(new) == 24 or _ends(engine, ids + new)
            with torch.inference_mode():
                logits = checkpoint.model(torch.tensor([ids + new]), torch.tensor(index))[0, len(ids) - 1 : -1].numpy()
            best = logits.max(axis=-1)
            assert np.all(best - logits[np.arange(len(new)), new] <= TOLERANCE)
        together = engine.generate(prompts, max_new_tokens=24)
        assert together == alone
        assert engine.generate(list(PROMPTS), max_new_tokens=24) == [engine.decode(ids) for ids in alone]


def _ends(engine: TextEngine, ids: Sequence[int]) -> bool:
    return int(engine([ids])[0, -1].argmax()) in engine.generation.end


def test_text_comes_whole_or_in_pieces(engine: TextEngine) -> None:
    for options in ({}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 1}):
        whole = engine.generate(PROMPTS[0], max_new_tokens=30, **options)
        pieces = list(engine.generate(PROMPTS[0], max_new_tokens=30, stream=True, **options))
        assert "".join(pieces) == whole and len(pieces) > 1
        ids = engine.generate(engine.encode(PROMPTS[0]), max_new_tokens=30, **options)
        assert ids == list(engine.generate(engine.encode(PROMPTS[0]), max_new_tokens=30, stream=True, **options))
        assert engine.decode(ids) == whole
    assert engine.generate(PROMPTS[0], temperature=2.0) != engine.generate(PROMPTS[0], temperature=2.0)


def test_text_ends_where_it_is_told_to(engine: TextEngine) -> None:
    text = engine.generate(PROMPTS[0], max_new_tokens=40, temperature=1.0, seed=0)
    stop = text[8:12]
    expected = text[: text.find(stop)]
    assert engine.generate(PROMPTS[0], max_new_tokens=40, temperature=1.0, seed=0, stop=stop) == expected
    assert engine.generate([PROMPTS[0]], max_new_tokens=40, temperature=1.0, seed=0, stop=[stop, "\0"]) == [expected]
    assert engine.generate(PROMPTS[0], max_new_tokens=0) == ""
    ids = engine.generate(engine.encode(PROMPTS[0]), max_new_tokens=6)
    ended = TextEngine(engine.engine, engine.tokenizer, GenerationSettings(end=(ids[3],)))
    assert ended.generate(engine.encode(PROMPTS[0]), max_new_tokens=6) == ids[: ids.index(ids[3])]
    short = len(engine.encode(PROMPTS[0])) + 4
    limited = TextEngine(engine.engine, engine.tokenizer, GenerationSettings(context_length=short))
    assert limited.generate(engine.encode(PROMPTS[0])) == ids[:4]
    with pytest.raises(UsageError, match=f"the prompt has {short + 1} tokens; python reads at most {short}: shorten"):
        limited.generate([5] * (short + 1))


def test_special_tokens_in_a_prompt_are_text_unless_asked_for(engine: TextEngine) -> None:
    (end,) = engine.generation.end
    assert end not in engine.encode("a<|endoftext|>")
    assert engine.encode("a<|endoftext|>", special_tokens=True)[-1] == end


def test_a_score_is_that_of_the_logits(engine: TextEngine) -> None:
    ids = engine.encode(PROMPTS[1])
    logits = torch.from_numpy(engine([ids]))[0, :-1].double()
    expected = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum()
    found = engine.score(PROMPTS[1])
    assert found.tokens == len(ids) - 1
    assert found.log_likelihood == pytest.approx(expected.item(), abs=1e-6 * len(ids))
    assert found.perplexity == pytest.approx(np.exp(-expected.item() / found.tokens))
    leading = TextEngine(engine.engine, engine.tokenizer, GenerationSettings(leading=(0,)))
    assert leading.score("x").tokens == 1
    with pytest.raises(UsageError, match="the text 'x' is too short to be scored"):
        engine.score("x")


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        (["a", ""], {}, "the prompt is empty"),
        ([1, 10**6], {}, "input_ids has the token 1000000"),
        (3, {}, "the prompt is 3; token ids are needed"),
        (None, {}, "the prompt is None"),
        (b"abc", {}, "the prompt is b'abc'; token ids are needed"),
        ({1: 2}, {}, "the prompt is {1: 2}; token ids are needed"),
        (["a", "b"], {"stream": True}, "stream is for one prompt"),
        ([1, 2], {"stop": "x"}, "stop strings are for text"),
        ("a", {"stop": [""]}, "stop has an empty string"),
        ("a", {"stop": [3]}, r"stop\[0\] is 3"),
        ("a", {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ("a", {"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ("a", {"seed": -1}, "seed is -1"),
        ("a", {"top_p": 7}, "top_p is 7"),
    ],
)
def test_what_cannot_be_generated_is_said(engine: TextEngine, prompt: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        engine.generate(prompt, **options)


def test_a_context_and_a_variant_are_chosen(bundle: Path) -> None:
    with pytest.raises(UsageError, match="has several contexts, choose one of cpp, english, python"):
        load(bundle)
    with pytest.raises(UsageError, match="has no context 'german'"):
        load(bundle, "german")
    with pytest.raises(UsageError, match="english has no variant 'int1'"):
        load(bundle, "english", "int1")
    assert load(bundle, "english").engine.variant.name == "cpu-fp32"


def test_engines_of_many_contexts_share_their_weights(bundle: Path) -> None:
    with load_all(bundle) as engines:
        assert list(engines) == ["cpp", "english", "python"] and engines.loaded == ()
        for context in engines:
            expected = load(bundle, context).generate(list(PROMPTS), max_new_tokens=10)
            assert engines[context].generate(list(PROMPTS), max_new_tokens=10) == expected
            assert engines[context] is engines[context]
        tensors = len(engines._weights._tensors)
        assert tensors < sum(len(_references(bundle, context)) for context in engines)
        with pytest.raises(KeyError):
            engines["german"]
    with pytest.raises(UsageError, match="were closed; open them again with load_all"):
        engines["cpp"]


def _references(bundle: Path, context: str) -> Sequence[Any]:
    from cpcompile.files.external_data import references_of

    return references_of(open_bundle(bundle).variant(context, "cpu-fp32").model)


def test_threads_get_what_one_gets(bundle: Path) -> None:
    with load_all(bundle) as engines:
        work = [(context, prompt) for prompt in PROMPTS for context in engines] * 3
        one_by_one = [engines[context].generate(prompt, max_new_tokens=6) for context, prompt in work]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda each: engines[each[0]].generate(each[1], max_new_tokens=6), work))
        assert found == one_by_one


@pytest.mark.slow
def test_eight_threads_take_no_more_memory_after_thousands_of_requests(bundle: Path) -> None:
    """In a process of its own: 8 threads x 1,000 requests over all contexts, each compared with the sequential one."""
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from cpcompile.machine.procfs import status_bytes
from cpcompile.runtime import load_all
with load_all(sys.argv[1], threads=1) as engines:
    prompts = ("Return the ", "import numpy as np", "x", "for (int i = 0; i < n; ++i) {")
    work = [(context, prompt) for prompt in prompts for context in engines]
    expected = [engines[c].generate(p, max_new_tokens=4) for c, p in work]
    with ThreadPoolExecutor(8) as pool:
        def run(thread, requests):  # a thread of its own each, because 8,000 futures take 15 MB
            for number in range(thread, thread + requests):
                context, prompt = work[number % len(work)]
                if engines[context].generate(prompt, max_new_tokens=4) != expected[number % len(work)]:
                    return False
            return True
        assert all(pool.map(run, range(8), [100] * 8))  # every thread has its buffers now
        before, whole = status_bytes("RssAnon"), status_bytes("VmRSS")
        assert all(pool.map(run, range(8), [1_000] * 8))
        # Pages of files come and go as the system likes; what the engines allocate is private.
        print((status_bytes("RssAnon") - before) / whole)
"""
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 0.05


def test_the_least_recently_used_engine_leaves(bundle: Path) -> None:
    with load_all(bundle, max_memory=1) as tight:
        for context in ("cpp", "english", "cpp"):
            held = tight[context]
            assert tight.loaded == (context,)
        assert held.generate("x", max_new_tokens=2) == load(bundle, "cpp").generate("x", max_new_tokens=2)
    with load_all(bundle) as wide:
        two = _bytes_of(wide, "cpp", "english")
    with load_all(bundle, max_memory=two) as engines:
        for context in ("cpp", "english", "cpp", "python"):
            engines[context]
        assert engines.loaded[-1] == "python" and "english" not in engines.loaded
    for wrong in (0, -1, "2GB", 1.5, True):
        with pytest.raises(UsageError, match=f"max_memory is {wrong!r}: give a number of bytes"):
            load_all(bundle, max_memory=wrong)  # type: ignore[arg-type]


def _bytes_of(engines: Engines, *contexts: str) -> int:
    for context in contexts:
        engines[context]
    return engines._bytes()


def test_a_bundle_from_before_opens_scores_and_generates(
    bundle: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its graphs have no cache and read the whole text; it does not say what ends a text."""
    old = tmp_path / "old.cpc"
    shutil.copytree(bundle, old)
    ir.save(whole_text_graph(measured / "model.pt", "python"), old / "python" / "cpu-fp32" / "model.onnx")

    def as_before(manifest: dict[str, Any]) -> None:
        ours = manifest["additional_metadata"]["cpcompile"]
        ours["version"] = 3
        for key in ("generation", "cache"):
            del ours[key]

    reseal(old, as_before)
    for path, says in ((old, "Warning: the model has no cache that can be captured"), (bundle, "")):
        warn_without_cache(path)
        warning = capsys.readouterr().err
        assert warning.startswith(says) and bool(warning) == bool(says)
    before, now = load(old, "python"), load(bundle, "python")
    assert not before.engine.has_cache and now.engine.has_cache
    assert before.generation.end == now.generation.end
    for prompt in (PROMPTS[0], list(PROMPTS)):
        assert before.generate(prompt, max_new_tokens=8) == now.generate(prompt, max_new_tokens=8)
    assert before.score(PROMPTS[1]).perplexity == pytest.approx(now.score(PROMPTS[1]).perplexity, rel=1e-5)
    result = CliRunner().invoke(
        main, ["check", str(old), "--baseline", str(tmp_path / "b.json"), "--update-baseline", "--without-model"]
    )
    assert result.exit_code == 0, result.output


def test_a_wrong_cache_fails_the_validation(measured: Path, bundle: Path, tmp_path: Path) -> None:
    """The engine is right on whole texts; only what goes on with its cache is wrong: keys are read as values."""
    wrong = tmp_path / "wrong.cpc"
    shutil.copytree(bundle, wrong)
    path = wrong / "python" / "cpu-fp32" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (attention,) = [node for node in model.graph.node if "past_key_values.1.value" in node.input]
    assert attention.op_type == "GroupQueryAttention"
    attention.input[:] = [name.replace("past_key_values.1.value", "past_key_values.1.key") for name in attention.input]
    onnx.save(model, path)
    reseal(wrong)
    assert np.array_equal(load(wrong, "python")([[5, 6, 7]]), load(bundle, "python")([[5, 6, 7]]))
    flags = ("--no-speed", "--no-memory", "--no-layers", "--json", "--model", str(measured / "model.pt"))
    result = CliRunner().invoke(main, ["validate", str(wrong), *flags])
    assert result.exit_code == 1, result.output
    parity = {c["name"]: c["variants"][0]["parity"] for c in json.loads(result.stdout)["contexts"]}
    assert parity["python"]["verdict"] == "fail" and "logits through the cache" in parity["python"]["reason"]
    assert parity["cpp"]["verdict"] == "pass"


def test_run_writes_what_generate_gives(bundle: Path, engine: TextEngine) -> None:
    arguments = ["run", str(bundle), "--context", "python", "-n", "12"]
    result = CliRunner().invoke(main, [*arguments, PROMPTS[0]])
    assert result.exit_code == 0 and result.stdout == engine.generate(PROMPTS[0], max_new_tokens=12) + "\n"
    piped = CliRunner().invoke(main, [*arguments, "-"], input=PROMPTS[0])
    assert piped.stdout == result.stdout
    options = ["--temperature", "1", "--top-k", "40", "--top-p", "0.9", "--repetition-penalty", "1.1", "--seed", "5"]
    sampled = CliRunner().invoke(main, [*arguments, *options, PROMPTS[0]])
    expected = engine.generate(
        PROMPTS[0], max_new_tokens=12, temperature=1, top_k=40, top_p=0.9, repetition_penalty=1.1, seed=5
    )
    assert sampled.stdout == expected + "\n"
    scored = CliRunner().invoke(main, [*arguments, PROMPTS[1], "--score"])
    found = engine.score(PROMPTS[1])
    assert scored.stdout == f"perplexity {found.perplexity:.4g} over {found.tokens} tokens\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x"], "has several contexts, choose one of cpp, english, python"),
        (["-c", "python", ""], "the prompt is empty"),
        (["-c", "python", "x", "--top-p", "2"], "top_p is 2.0: it has to be above 0 and at most 1"),
        (["-c", "python", "x", "--variant", "y"], "python has no variant 'y'"),
    ],
)
def test_run_says_what_is_wrong(bundle: Path, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["run", str(bundle), *arguments])
    assert result.exit_code == 2 and says in result.output


def test_memory_comes_back_on_close(bundle: Path) -> None:
    engines = load_all(bundle)
    sessions = [weakref.ref(engines[context].engine.session) for context in engines]
    assert all(session() is not None for session in sessions)
    engines.close()
    gc.collect()
    assert all(session() is None for session in sessions)
