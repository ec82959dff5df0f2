"""The examples in Python: the server answers OpenAI's own client, and the application continues a text."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from cpcompile.bundle import open_bundle
from cpcompile.runtime import TextEngine, load
from tests.bundles import reseal

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "python"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token }}def{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Return the value."}]


@pytest.fixture(scope="module")
def bundle(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The context python has a chat template, the others have none."""
    copy = shutil.copytree(measured / "model.cpc", tmp_path_factory.mktemp("served") / "model.cpc")

    def edit(manifest: dict) -> None:
        manifest["additional_metadata"]["cpcompile"]["generation"]["python"]["chat_template"] = TEMPLATE

    reseal(copy, edit)
    return copy


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / "server.py", bundle, "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)
        if process.stderr:
            process.stderr.close()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def english(bundle: Path) -> TextEngine:
    return load(bundle, context="english", threads=1)


def test_contexts_are_models(client: openai.OpenAI) -> None:
    assert sorted(model.id for model in client.models.list()) == ["cpp", "english", "python"]


def test_completions_are_those_of_the_engine(client: openai.OpenAI, english: TextEngine) -> None:
    options = {"model": "english", "prompt": "Return the ", "max_tokens": 12}
    expected = english.generate("Return the ", max_new_tokens=12)
    whole = client.completions.create(**options, temperature=0)
    assert whole.choices[0].text == expected and whole.choices[0].finish_reason == "length"
    prompt = len(english.encode("Return the "))
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 12)
    assert whole.usage.total_tokens == prompt + 12
    with client.completions.create(**options, temperature=0, stream=True) as stream:
        pieces = [event.choices[0] for event in stream]
    assert "".join(each.text for each in pieces) == expected and len(pieces) > 3
    assert [each.finish_reason for each in pieces] == [None] * (len(pieces) - 1) + ["length"]
    sampled = [client.completions.create(**options, temperature=1.5, top_p=0.9, seed=seed) for seed in (3, 3, 4)]
    texts = [each.choices[0].text for each in sampled]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == english.generate("Return the ", max_new_tokens=12, temperature=1.5, top_p=0.9, seed=3)


def test_stop_strings_end_an_answer(client: openai.OpenAI, english: TextEngine) -> None:
    text = english.generate("Return the ", max_new_tokens=12)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    for given in (stop, ["\0never", stop]):
        ended = client.completions.create(
            model="english", prompt="Return the ", max_tokens=12, temperature=0, stop=given
        )
        assert ended.choices[0].text == text[: text.index(stop)] and ended.choices[0].finish_reason == "stop"


def test_chats_use_the_template_of_the_model(client: openai.OpenAI, bundle: Path, english: TextEngine) -> None:
    python = load(bundle, context="python", threads=1)
    rendered = "system: Be brief.\nuser: Return the value.\n<|endoftext|>def"
    ids = python.encode(rendered, special_tokens=True)
    assert 0 in ids  # the template's own token, not its letters
    prompts = {"python": ids, "english": english.encode("Be brief.\nReturn the value.\n")}
    for model, engine in {"python": python, "english": english}.items():
        expected = engine.decode(engine.generate(prompts[model], max_new_tokens=10))
        options = {"model": model, "messages": MESSAGES, "max_completion_tokens": 10, "temperature": 0}
        whole = client.chat.completions.create(**options)
        assert (whole.choices[0].message.content, whole.choices[0].message.role) == (expected, "assistant")
        assert whole.usage is not None and whole.usage.prompt_tokens == len(prompts[model])
        with client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
            events = list(stream)
        assert events[-1].usage == whole.usage and not events[-1].choices
        assert "".join(each.choices[0].delta.content or "" for each in events[:-1]) == expected
        assert events[0].choices[0].delta.role == "assistant" and events[-2].choices[0].finish_reason is not None


def test_errors_have_the_form_of_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'klingon'") as unknown:
        client.completions.create(model="klingon", prompt="a")
    assert (unknown.value.code, unknown.value.type) == ("model_not_found", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="temperature is -1.0") as negative:
        client.completions.create(model="english", prompt="a", temperature=-1)
    assert negative.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="tools: Extra inputs are not permitted") as extra:
        client.chat.completions.create(model="english", messages=MESSAGES, tools=[])
    assert extra.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.completions.create(model="english", prompt="", stream=True)


def test_many_clients_at_once_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    def ask(model: str) -> str:
        answer = client.completions.create(model=model, prompt="Return the ", max_tokens=8, temperature=0)
        return str(answer.choices[0].text)

    models = ["english", "python", "cpp"] * 8
    alone = {model: ask(model) for model in models[:3]}
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, models)) == [alone[model] for model in models]


def test_the_snippet_of_the_documentation_talks_to_the_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r'```python title="Needs the server"\n(.*?)```', page, flags=re.DOTALL)
    assert "http://localhost:8000/v1" in snippet
    exec(compile(snippet.replace("http://localhost:8000/v1", url), "serve.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_an_application_with_three_contexts(bundle: Path) -> None:
    text = "Return the number of "
    names = ("english", "python", "cpp")
    command = [sys.executable, EXAMPLES / "three_contexts.py", bundle, *names, "--text", text, "--tokens", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    engines = {name: load(open_bundle(bundle), name, threads=1) for name in names}
    fit = {name: engine.score(text).log_likelihood for name, engine in engines.items()}
    best = max(fit, key=fit.__getitem__)
    first, *_ = done.stdout.splitlines()
    assert first.split()[0] == best
    assert done.stdout.split("\n", 3)[3] == f"{text}{engines[best].generate(text, max_new_tokens=8)}\n"
