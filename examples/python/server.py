"""An OpenAI-compatible server of a bundle: its contexts are the models.

python examples/python/server.py model.cpc --port 8000

GET /v1/models, POST /v1/completions and /v1/chat/completions, with streaming; errors have OpenAI's form. Options that
it does not know, such as tools, are refused. It has no keys and no encryption: put it behind something that has.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.runtime import TextEngine, load_all
from cpcompile.runtime.text_stream import TextStream

CHAT_TOKENS = 512
"""The most tokens of an answer in a chat, if a request does not say."""


class Options(BaseModel):
    """What both kinds of requests have in common; the defaults are OpenAI's."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None


class Completion(Options):
    """POST /v1/completions"""

    prompt: str


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class Chat(Options):
    """POST /v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: int | None = None


def create_app(bundle: Path) -> FastAPI:
    """The server of `bundle`; an engine is loaded when it is first asked for."""
    engines, app, started = load_all(bundle), FastAPI(title="cpcompile"), int(time.time())

    def engine_of(model: str) -> TextEngine:
        if model not in engines:
            raise HTTPException(404, f"there is no model {model!r}; there are {', '.join(engines)}")
        return engines[model]

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        known = [{"id": name, "object": "model", "created": started, "owned_by": "cpcompile"} for name in engines]
        return {"object": "list", "data": known}

    @app.post("/v1/completions")
    def completions(request: Completion) -> Response:
        engine, limit = engine_of(request.model), request.max_tokens
        return answer(engine, engine.encode(request.prompt), request, 16 if limit is None else limit, chat=False)

    @app.post("/v1/chat/completions")
    def chat(request: Chat) -> Response:
        engine, limits = engine_of(request.model), (request.max_completion_tokens, request.max_tokens, CHAT_TOKENS)
        limit = next(each for each in limits if each is not None)
        return answer(engine, chat_ids(engine, request.messages), request, limit, chat=True)

    @app.exception_handler(HTTPException)
    def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, error.detail, code="model_not_found")

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][1:]))
        return failure(400, f"{name}: {first['msg']}", param=name)

    @app.exception_handler(CpcompileError)
    def failed(_: Request, error: CpcompileError) -> JSONResponse:
        return failure(400 if isinstance(error, UsageError) else 500, str(error))

    return app


def chat_ids(engine: TextEngine, messages: list[Message]) -> list[int]:
    """The prompt that the model's chat template makes; without a template, each message is a line."""
    settings = engine.generation
    if settings.chat_template is None:
        return engine.encode("".join(f"{each.content}\n" for each in messages))
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    special = {"bos_token": settings.leading[:1], "eos_token": settings.end[:1]}
    names = {name: "".join(map(engine.tokenizer.id_to_token, ids)) for name, ids in special.items()}
    plain = [each.model_dump() for each in messages]
    text = sandbox.from_string(settings.chat_template).render(messages=plain, add_generation_prompt=True, **names)
    return engine.encode(text, special_tokens=True)


def answer(engine: TextEngine, ids: list[int], request: Options, limit: int, *, chat: bool) -> Response:
    """The text after `ids` as JSON, or piece by piece as server-sent events."""
    kind, letters = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
    head = {"id": f"{letters}-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    sampling = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
    tokens = engine.generate(ids, max_new_tokens=limit, stream=True, **sampling)
    text, written = TextStream(engine.tokenizer, ids, stop), 0

    def pieces() -> Iterator[str]:
        nonlocal written
        for token in tokens:
            written += 1
            yield text.add(token)
            if text.stopped:
                return
        yield text.finish()

    def reason() -> str:
        full = written == limit or len(ids) + written == engine.generation.context_length
        return "length" if full and not text.stopped else "stop"

    def usage() -> dict[str, int]:
        return {"prompt_tokens": len(ids), "completion_tokens": written, "total_tokens": len(ids) + written}

    def body(form: str, content: dict[str, Any], ended: str | None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, "finish_reason": ended, **content}
        return {**head, "object": form, "choices": [choice], **more}

    def events() -> Iterator[str]:
        form = "chat.completion.chunk" if chat else kind
        if chat:
            yield event(body(form, {"delta": {"role": "assistant", "content": ""}}, None))
        for piece in filter(None, pieces()):
            yield event(body(form, {"delta": {"content": piece}} if chat else {"text": piece}, None))
        yield event(body(form, {"delta": {}} if chat else {"text": ""}, reason()))
        if (request.stream_options or {}).get("include_usage"):
            yield event({**head, "object": form, "choices": [], "usage": usage()})
        yield "data: [DONE]\n\n"

    if request.stream:
        return StreamingResponse(events(), media_type="text/event-stream")
    whole = "".join(pieces())
    content = {"message": {"role": "assistant", "content": whole}} if chat else {"text": whole}
    return JSONResponse(body(kind, content, reason(), usage=usage()))


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def failure(status: int, message: str, *, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
def main(bundle: Path, host: str, port: int) -> None:
    """Serve the contexts of BUNDLE as models of an OpenAI-compatible API."""
    uvicorn.run(create_app(bundle), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    main()
