"""The HTTP side: `make_app` gives the Starlette application over an engine.

    GET  /v1/models             the one model
    POST /v1/completions        text behind a prompt
    POST /v1/chat/completions   the assistant's next turn
    GET  /health, GET /metrics  for load balancers and for Prometheus; without a key

A body is read in a thread beside, so that a long one delays nobody. Answers stream as server-sent events. A client that leaves
frees what it had. Every fault is OpenAI's error object.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rest_jax.rollout import requests
from rest_jax.serving import protocol
from rest_jax.serving.engine import Engine, EngineEnded, QueueFull, Sampled
from rest_jax.serving.meters import Meters
from rest_jax.serving.prompts import Asked, Served, completion, read_chat, read_completion
from rest_jax.serving.protocol import ApiError, ChatRequest, CompletionRequest, Format, Head
from rest_jax.serving.text import Completion, Delta

_GREEDY = 1e-4  # temperatures below are 0
_BODY_SECONDS = 60.0  # for a client to send a body
# of a chat: what its tokens may take, escapes and the syntax of JSON included
_BODY_BYTES, _TOKEN_BYTES = 2**16, 32
_LONGEST_WAIT = 60  # seconds that a client is told to wait
_Body = CompletionRequest | ChatRequest
_FORMATS: dict[type[_Body], tuple[Format, Callable[[Served, Any], Asked]]] = {
    ChatRequest: (protocol.CHAT, read_chat),
    CompletionRequest: (protocol.COMPLETION, read_completion),
}


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask, and how much."""

    api_key: str | None = None
    max_body: int = 2**22  # bytes


@dataclasses.dataclass(frozen=True)
class _Job:
    """A request that is being answered."""

    head: Head
    format: Format
    body: _Body
    asked: Asked
    completions: list[Completion]  # of each prompt n
    sampled: Sampled

    @property
    def prompts(self) -> list[list[int]]:
        return [ids.tolist() for ids in self.asked.prompts]

    def prompt_of(self, index: int) -> list[int]:
        return self.asked.prompts[index // self.body.n].tolist()

    @property
    def drawn(self) -> int:
        return sum(one.drawn for one in self.completions)


class _Server:
    """What the handlers share. A resource of the event loop's thread."""

    def __init__(self, served: Served, engine: Engine, access: Access):
        self.served, self.engine, self.access = served, engine, access
        self.meters = Meters(engine)
        # one thread: tokenizers of transformers are not made for several
        self.readers = ThreadPoolExecutor(1, "reader")
        self.created = int(time.time())

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        model = {"id": self.served.name, "object": "model", "created": self.created}
        return JSONResponse({"object": "list", "data": [model | {"owned_by": "rest-jax"}]})

    async def health(self, request: Request) -> Response:
        ended = self.engine.ended
        return JSONResponse({"status": ended or "ok"}, 200 if ended is None else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(*self.meters.page())

    async def answer(self, kind: type[_Body], request: Request) -> Response:
        self._authorize(request)
        most = self.access.max_body
        if kind is ChatRequest:  # what cannot fit is not even read
            most = min(most, _BODY_BYTES + _TOKEN_BYTES * self.served.max_prompt_tokens)
        try:
            data = await _body(request, most)
        except asyncio.CancelledError as error:  # the server ends, and this client does not write
            raise ApiError(503, self.engine.ended or "cancelled") from error
        loop = asyncio.get_running_loop()
        body, asked = await loop.run_in_executor(self.readers, self._read, kind, data)
        job = self._begin(kind, body, asked)
        if body.stream:
            return _Events(self._events(job), functools.partial(self._end, job), self.engine)
        try:
            deltas = await _unless_gone(request, self._whole(job))
        finally:
            self._end(job)
        return JSONResponse(job.format.reply(job.head, job.prompts, deltas))

    def _authorize(self, request: Request) -> None:
        key = self.access.api_key
        said = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not secrets.compare_digest(said.encode(), key.encode()):
            why = "a wrong API key" if said else "an API key is needed: Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, why, code="invalid_api_key", headers=headers)

    def _read(self, kind: type[_Body], data: bytes) -> tuple[_Body, Asked]:
        body = protocol.read_body(data, kind)
        name = self.served.name
        if body.model not in (None, name):
            message = f"model: {body.model[:60]!r} is not served here, {name!r} is"
            raise ApiError(404, message, "model", "model_not_found")
        return body, _FORMATS[kind][1](self.served, body)

    def _begin(self, kind: type[_Body], body: _Body, asked: Asked) -> _Job:
        count = len(asked.prompts) * body.n
        if count > self.engine.most:
            message = f"n: {count} completions, at most {self.engine.most} are given at once"
            raise ApiError(400, message, "n")
        seed = secrets.randbits(31) if body.seed is None else body.seed
        wanted = [
            requests.Request(
                ids=ids,
                max_tokens=asked.max_tokens,
                temperature=0.0 if body.temperature < _GREEDY else body.temperature,
                top_p=body.top_p,
                seed=seed,
                sample=sample,
                top_logprobs=body.top or 0,
            )
            for ids in asked.prompts
            for sample in range(body.n)
        ]
        try:
            sampled = self.engine.sample(wanted)
        except EngineEnded as error:
            raise ApiError(503, str(error)) from error
        except QueueFull as error:
            wait = str(min(max(1, math.ceil(self.engine.seconds)), _LONGEST_WAIT))
            message = f"{self.engine.active} requests run or wait; try again in {wait} s"
            raise ApiError(
                429, message, code="queue_full", headers={"Retry-After": wait}
            ) from error
        completions = [completion(self.served, body, asked) for _ in wanted]
        head = Head.of(body, self.served.name)
        return _Job(head, _FORMATS[kind][0], body, asked, completions, sampled)

    def _end(self, job: _Job) -> None:
        """However it ends: nothing is left of it."""
        job.sampled.close()
        self.meters.seconds.observe(time.monotonic() - job.sampled.begun)

    async def _pieces(self, job: _Job) -> AsyncIterator[tuple[int, Completion]]:
        """Completions, each after every piece that is drawn of it."""
        left, first = len(job.completions), True
        while left:
            try:
                index, piece = await job.sampled.next()
            except EngineEnded as error:
                raise ApiError(503, str(error)) from error
            except ValueError as error:
                raise ApiError(400, str(error)) from error
            one = job.completions[index]
            one.add(piece)
            if first:
                self.meters.first_token.observe(time.monotonic() - job.sampled.begun)
                first = False
            if one.finish is not None:
                left -= 1
                job.sampled.cancel(index)
            yield index, one

    async def _whole(self, job: _Job) -> list[Delta]:
        async for _ in self._pieces(job):
            pass
        return [one.read() for one in job.completions]

    async def _events(self, job: _Job) -> AsyncIterator[str]:
        """Server-sent events: chunks, and the end."""
        head, form = job.head, job.format
        told: set[int] = set()
        if form.first is not None:
            for index in range(len(job.completions)):
                yield _event(form.opening(head, index))
        try:
            async for index, one in self._pieces(job):
                delta = one.read()
                prompt = None
                if head.return_token_ids and index not in told:
                    prompt = job.prompt_of(index)
                shown = delta.text or delta.thought or delta.calls or delta.finish is not None
                if shown or prompt or head.return_token_ids or head.top is not None:
                    told.add(index)
                    yield _event(form.chunk_of(head, index, delta, prompt))
        except ApiError as error:
            yield _event(error.body)
            return
        if job.body.stream_options.include_usage:
            yield _event(form.ending(head, sum(map(len, job.asked.prompts)), job.drawn))
        yield "data: [DONE]\n\n"


class _Events(StreamingResponse):
    """Server-sent events; `end` is called when they end, however they do."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None], engine: Engine):
        headers = {"Cache-Control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._end, self._engine = end, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            if self._engine.ended is None:
                raise  # else the server ends, and this client does not read
        finally:
            self._end()


def make_app(
    served: Served, engine: Engine, access: Access, on_failure: Callable[[], None]
) -> Starlette:
    """The application; the engine runs while it does. `on_failure`: called when the engine has failed."""
    server = _Server(served, engine, access)

    @contextlib.asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        engine.start(on_failure)
        yield
        engine.stop()
        server.readers.shutdown()

    def post(kind: type[_Body]) -> Callable[[Request], Awaitable[Response]]:
        return server.meters.timed(functools.partial(server.answer, kind))

    routes = [
        Route("/v1/models", server.models),
        Route("/v1/completions", post(CompletionRequest), methods=["POST"]),
        Route("/v1/chat/completions", post(ChatRequest), methods=["POST"]),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
    ]
    handlers: Any = {ApiError: _fault, HTTPException: _http_fault, Exception: _defect}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=running)


async def _body(request: Request, most: int) -> bytes:
    """The bytes of a body. ApiError 408, 413 or 415 for one that is late, long or not said to be JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type: application/json is needed, found {kind[:60]!r}")
    too_long = ApiError(413, f"body: more than {most:,} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise too_long
    except TimeoutError as error:
        raise ApiError(408, f"body: not here within {_BODY_SECONDS:g} s") from error
    return bytes(data)


async def _unless_gone(request: Request, work: Awaitable[list[Delta]]) -> list[Delta]:
    """What the work gives. ClientDisconnect when the client leaves before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _event(said: dict[str, Any]) -> str:
    return f"data: {json.dumps(said, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _fault(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _http_fault(request: Request, error: HTTPException) -> Response:
    said = {404: f"{request.url.path}: no such path", 405: f"{request.method}: not allowed here"}
    message = said.get(error.status_code, error.detail)
    return await _fault(request, ApiError(error.status_code, message, headers=error.headers))


async def _defect(request: Request, error: Exception) -> Response:
    return await _fault(request, ApiError(500, f"a defect of the server: {type(error).__name__}"))
