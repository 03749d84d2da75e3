"""The routes of the server: completions, models, health, metrics."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from megaxelm.errors import MegaxelmError
from megaxelm.serve.answers import Choice, TokenTexts, usage
from megaxelm.serve.chat import ChatChoice, ChatRequest, Template
from megaxelm.serve.errors import ApiError, of_validation
from megaxelm.serve.guard import HEALTH, Gate, Guard
from megaxelm.serve.limits import Limits
from megaxelm.serve.metrics import Metrics
from megaxelm.serve.protocol import (
    CompletionRequest,
    PromptText,
    Sampling,
    TokenizerLike,
    generation_requests,
    read_prompts,
    refuse_unsupported,
)
from megaxelm.serve.runner import EngineRunner, QueueFull, Texts, Unavailable

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", HEALTH)


@dataclass
class Service:
    """One model that is served.

    Args:
        name: what clients call it. experts: names in the order of the weights.
        positions: tokens that a text may have; a chat without `max_tokens` goes on so far.
        template: of chats; None for a model that does not chat.
    """

    name: str
    experts: Sequence[str]
    tokenizer: TokenizerLike
    runner: EngineRunner
    metrics: Metrics
    limits: Limits = field(default_factory=Limits)
    key: str | None = None
    positions: int = 2048
    template: Template | None = None
    gate: Gate = field(default_factory=Gate)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.tokenizer)
        self.metrics.watch("running_texts", "Texts that the engine writes at present", lambda: self.runner.num_running)
        self.metrics.watch("waiting_texts", "Texts that wait for a place in the batch", lambda: self.runner.num_waiting)
        self.metrics.watch("engine_alive", "1 while the engine can write", lambda: float(self.runner.alive))


def make_app(service: Service) -> FastAPI:
    """The ASGI application. The engine's thread must run, and is not stopped by it."""
    app = FastAPI(title="MegaXELM", docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_handlers(app)

    @app.get(HEALTH)
    async def health() -> Response:
        reason = service.gate.closed or (None if service.runner.alive else "the engine does not run any more; restart the server")
        return _json({"status": "ok" if reason is None else reason}, 200 if reason is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        _check_model(service, name)
        return _json(_model(service))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_model(service, body.model)
        refuse_unsupported(body)
        # A client that leaves before its answer begins is noticed too: its texts are given up.
        answer = await _unless_gone(request, lambda: _complete(service, body))
        return answer if answer is not None else Response(status_code=499)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        _check_model(service, body.model)
        if service.template is None:
            raise ApiError(
                400,
                f"{service.name} writes texts on: its tokenizer has no chat template, so turns of a chat would mean nothing to it; "
                "put your text into `prompt` of /v1/completions",
                code="chat_not_supported",
            )
        refuse_unsupported(body)
        answer = await _unless_gone(request, lambda: _chat(service, body))
        return answer if answer is not None else Response(status_code=499)

    def answered(path: str, status: int) -> None:
        service.metrics.request_answered(path if path in _PATHS else "other", status)

    app.add_middleware(Guard, limits=service.limits, gate=service.gate, key=service.key, answered=answered)
    return app


async def _complete(service: Service, body: CompletionRequest) -> Response:
    num_prompts = 1 if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else len(body.prompt)
    _check_texts(service, body, num_prompts)
    prompts = await asyncio.to_thread(read_prompts, body.prompt, service.tokenizer)
    experts = service.experts if body.weights else None
    choices = [
        Choice(number * (body.n or 1) + choice, service.texts, prompt.text if body.echo else "", body.logprobs, experts)
        for number, prompt in enumerate(prompts)
        for choice in range(body.n or 1)
    ]
    answer = _Answer(service, body, "cmpl", ("text_completion", "text_completion"), choices)
    return await _write(service, body, prompts, body.max_tokens or _DEFAULT_MAX_TOKENS, body.logprobs or 0, answer)


async def _chat(service: Service, body: ChatRequest) -> Response:
    assert service.template is not None
    _check_texts(service, body, 1)
    ids = await asyncio.to_thread(service.template, [message.plain() for message in body.messages])
    left = max(service.positions - len(ids), 1)
    max_tokens = body.max_completion_tokens or body.max_tokens or min(left, service.limits.tokens or left)
    experts = service.experts if body.weights else None
    choices = [ChatChoice(choice, service.texts, "", body.num_logprobs, experts) for choice in range(body.n or 1)]
    answer = _Answer(service, body, "chatcmpl", ("chat.completion", "chat.completion.chunk"), choices)
    return await _write(service, body, [PromptText(ids, "")], max_tokens, body.num_logprobs or 0, answer)


def _check_texts(service: Service, body: Sampling, num_prompts: int) -> None:
    if num_prompts * (body.n or 1) > service.limits.texts:
        raise ApiError(
            400, f"{num_prompts} prompts with n = {body.n or 1}: at most {service.limits.texts} texts a request", "n", "invalid_value"
        )


async def _write(
    service: Service, body: Sampling, prompts: Sequence[PromptText], max_tokens: int, logprobs: int, answer: _Answer
) -> Response:
    texts = await _submit(service, generation_requests(body, prompts, max_tokens, logprobs, service.limits))
    if body.stream:
        return _Stream(texts, answer)
    try:
        return await answer.whole(texts)
    finally:
        texts.close()


async def _submit(service: Service, requests: Sequence[Any]) -> Texts:
    try:
        return await service.runner.submit(requests)
    except QueueFull:
        raise ApiError(
            429, f"more than {service.limits.queue} texts wait already; try again later", code="queue_full", headers={"retry-after": "1"}
        ) from None
    except Unavailable as error:
        raise ApiError(503, str(error), code="unavailable", headers={"retry-after": "10"}) from None
    except MegaxelmError as error:
        raise ApiError(400, str(error), code="invalid_value") from None


class _Answer:
    """Makes the answer to one request from the tokens of its texts."""

    def __init__(self, service: Service, body: Sampling, prefix: str, objects: tuple[str, str], choices: Sequence[Choice]) -> None:
        self._body, self._objects, self._choices = body, objects, choices
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}

    async def whole(self, texts: Texts) -> Response:
        events: list[list[Any]] = [[] for _ in self._choices]
        try:
            async for index, event in texts:
                events[index].append(event)
        except Unavailable as error:
            raise ApiError(503, str(error), code="unavailable") from None
        parts = [choice.part(found) for choice, found in zip(self._choices, events, strict=True)]
        return _json(self._head | {"object": self._objects[0], "choices": parts, "usage": self._usage(texts, sum(map(len, events)))})

    async def chunks(self, texts: Texts) -> AsyncIterator[bytes]:
        """Server-sent events, one a token; the last says [DONE], unless the engine failed."""
        wants_usage = self._body.stream_options is not None and bool(self._body.stream_options.include_usage)
        head = self._head | {"object": self._objects[1]} | ({"usage": None} if wants_usage else {})
        shows_tokens = self._body.weights or self._body.logprobs not in (None, False)
        written = 0
        try:
            async for index, event in texts:
                written += 1
                # Nothing to show: a character or a stop string may be unfinished.
                if event.text or event.finish_reason or self._choices[index].fresh or shows_tokens:
                    yield _sse(head | {"choices": [self._choices[index].chunk([event])]})
        except Unavailable as error:
            yield _sse(ApiError(503, str(error), code="unavailable").body())
            return
        if wants_usage:
            yield _sse(head | {"choices": [], "usage": self._usage(texts, written)})
        yield b"data: [DONE]\n\n"

    def _usage(self, texts: Texts, written: int) -> dict[str, int]:
        return usage(texts.prompt_tokens[:: self._body.n or 1], written)


class _Stream(StreamingResponse):
    """Gives the texts up when the client goes away, at whatever moment."""

    def __init__(self, texts: Texts, answer: _Answer) -> None:
        super().__init__(
            answer.chunks(texts), media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        self._texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._texts.close()


async def _unless_gone(request: Request, work: Callable[[], Any]) -> Response | None:
    """What `work` makes, or None when the client went away before."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone, done = asyncio.ensure_future(leave()), asyncio.ensure_future(work())
    try:
        await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        return done.result() if done.done() else None
    finally:
        gone.cancel()
        done.cancel()


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(404, f"model {name[:200]!r}: this server has {service.name}", "model", "model_not_found")


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "megaxelm", "experts": list(service.experts)}


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _sse(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _add_error_handlers(app: FastAPI) -> None:
    fields = {"/v1/completions": list(CompletionRequest.model_fields), "/v1/chat/completions": list(ChatRequest.model_fields)}

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return of_validation(error.errors(), fields.get(request.url.path, [])).response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = f"{request.method} {request.url.path}: {error.detail}; there are {', '.join(_PATHS)}"
        return ApiError(error.status_code, text if error.status_code in (404, 405) else str(error.detail), headers=error.headers).response()

    async def defect(request: Request, error: Exception) -> Response:
        return ApiError(500, "a defect of the server; its log has the details", code="internal_error").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, defect)
