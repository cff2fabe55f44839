"""The HTTP app: the part of the OpenAI API that an endpoint of base and deltas can answer. Free of Ray."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from orchestrator.config.openai import ChatRequest, CompletionRequest, RequestError, read_request
from orchestrator.errors import MantaError, RegistryError, ServeError
from orchestrator.serve import request as work
from orchestrator.serve.answer import Answer, Chat, Completion, failure, usage
from orchestrator.serve.deltas import Deltas, Lease, UnknownModelError
from orchestrator.serve.engine import Engine
from orchestrator.serve.prompt import Prompter, sampling
from orchestrator.serve.request import BusyError, Event, Ticket

log = logging.getLogger("manta.serve")
R = TypeVar("R", ChatRequest, CompletionRequest)
_MOST_BYTES = 8 * 2**20
_RETRY_S = 1


class _Refused(Exception):
    """A response instead of an answer."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> JSONResponse:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        headers = {"Retry-After": str(_RETRY_S)} if self.status in (429, 503) else None
        return JSONResponse(failure(self.message, kind, self.param, self.code), self.status, headers)


def build(engine: Engine, deltas: Deltas, tokenizer: Any, *, max_bytes: int = _MOST_BYTES) -> Starlette:
    """The ASGI app over a running engine and its deltas. Bodies above ``max_bytes`` are refused with 413."""
    api = _Api(engine, deltas, Prompter(tokenizer), max_bytes)
    routes = [
        Route("/v1/models", _guarded(api.models)),
        Route("/v1/models/{model:path}", _guarded(api.model)),
        Route("/v1/chat/completions", _guarded(api.chat), methods=["POST"]),
        Route("/v1/completions", _guarded(api.completions), methods=["POST"]),
        Route("/healthz", api.health),
        Route("/metrics", api.metrics),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


def _guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Every error as an answer in the API's shape."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except _Refused as refused:
            return refused.response()
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            return _Refused(500, "internal error; see the server's log").response()

    return guarded


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


class _Api:
    def __init__(self, engine: Engine, deltas: Deltas, prompter: Prompter, max_bytes: int) -> None:
        self._engine, self._deltas, self._prompter, self._max_bytes = engine, deltas, prompter, max_bytes

    # -- what is here ---------------------------------------------------------------------------------------------

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._listed()})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        for entry in self._listed():
            if entry["id"] == name:
                return JSONResponse(entry)
        raise _Refused(404, f"model {name[:100]!r} is not served here", param="model", code="model_not_found")

    def _listed(self) -> list[dict[str, Any]]:
        base = self._deltas.base_name
        return [
            {
                "id": name,
                "object": "model",
                "created": held.since if held else 0,
                "owned_by": "manta",
                "root": held.label if held else base,
                "parent": base if held else None,
                "sha256": held.sha256 if held else None,
                "max_model_len": self._engine.length,
            }
            for name, held in self._deltas.models().items()
        ]

    async def health(self, _: Request) -> Response:
        healthy = self._engine.healthy()
        return PlainTextResponse("ok" if healthy else "the engine is stuck", 200 if healthy else 503)

    async def metrics(self, _: Request) -> Response:
        stats = self._engine.stats
        counters = ("requests", "rejected", "failed", "cancelled", "prompt_tokens", "generated_tokens", "steps")
        lines = []
        for kind, names in (("counter", counters), ("gauge", ("running", "waiting"))):
            for name in names:
                full = f"manta_{name}_total" if kind == "counter" else f"manta_{name}"
                lines += [f"# TYPE {full} {kind}", f"{full} {getattr(stats, name)}"]
        lines += ["# TYPE manta_models gauge", f"manta_models {len(self._deltas.models())}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    # -- generation -----------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        wish = await self._read(ChatRequest, request)
        limit = wish.max_completion_tokens or wish.max_tokens
        return await self._generate(request, wish, lambda: [self._prompter.chat(wish)], limit)

    async def completions(self, request: Request) -> Response:
        wish = await self._read(CompletionRequest, request)
        if wish.echo and wish.logprobs is not None:
            raise _Refused(400, "echo and logprobs cannot be had together", param="echo")
        return await self._generate(request, wish, lambda: self._prompter.completions(wish), wish.max_tokens or 16)

    async def _read(self, kind: type[R], request: Request) -> R:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_bytes:
                raise _Refused(413, f"the body exceeds {self._max_bytes} bytes")
        try:
            return read_request(kind, bytes(body))
        except RequestError as error:
            raise _Refused(400, str(error), param=error.param) from error

    async def _generate(
        self, request: Request, wish: ChatRequest | CompletionRequest, render: Callable[[], Any], limit: int | None
    ) -> Response:
        try:
            prompts: list[list[int]] = await asyncio.to_thread(render)
        except ServeError as error:
            raise _Refused(400, str(error)) from error
        count = len(prompts) * wish.n
        if count > self._engine.rows + self._engine.max_queued:
            raise _Refused(400, f"{count} answers in one request are more than this endpoint takes", param="n")
        lease = await self._lease(wish.model, count)
        try:
            requests = self._requests(wish, prompts, limit, lease)
            tickets = self._engine.submit(requests, loop=asyncio.get_running_loop())
        except BaseException as error:
            for _ in range(count):
                lease.release()
            if isinstance(error, BusyError):
                raise _Refused(503, str(error), code="busy") from error
            if isinstance(error, ServeError):
                raise _Refused(400, str(error)) from error
            raise
        whole = isinstance(wish, ChatRequest)
        counted = bool(wish.stream_options and wish.stream_options.include_usage)
        logprobs = wish.logprobs is not None and wish.logprobs is not False
        kind = Chat if whole else Completion
        answer = kind(wish.model, lease.fingerprint, self._prompter.token, logprobs, bool(wish.stream) and counted)
        echoed = isinstance(wish, CompletionRequest) and wish.echo
        echoes = [self._prompter.text(p) if echoed else "" for p in prompts for _ in range(wish.n)]
        read = sum(map(len, prompts))
        if wish.stream:
            return _Stream(_chunks(answer, tickets, echoes, read if counted else None), tickets)
        return await _whole(request, answer, tickets, echoes, read)

    def _requests(
        self, wish: ChatRequest | CompletionRequest, prompts: list[list[int]], limit: int | None, lease: Lease
    ) -> list[work.Request]:
        made: list[work.Request] = []
        room = self._engine.room(lease.slot)
        for prompt in prompts:
            most = room - len(prompt) if limit is None else limit
            if most < 1 or len(prompt) + most > room:
                asked = f"{len(prompt)} tokens of prompt" + ("" if limit is None else f" + {limit} of answer")
                message = f"{asked} are more than this endpoint's {room}"
                raise _Refused(413, message, param="messages", code="context_length_exceeded")
            for _ in range(wish.n):
                params = sampling(wish, most, len(made), self._engine.vocabulary)
                made.append(work.Request(prompt, params, lease.slot, lease.release))
        return made

    async def _lease(self, model: str, count: int) -> Lease:
        for _ in range(2):
            if (lease := self._deltas.lease(model, count)) is not None:
                return lease
            try:
                await asyncio.to_thread(self._deltas.load, model)
            except UnknownModelError as error:
                raise _Refused(404, str(error), param="model", code="model_not_found") from error
            except RegistryError as error:
                raise _Refused(503, str(error), param="model") from error
            except MantaError as error:
                raise _Refused(400, f"model {model!r} cannot be served: {error}", param="model") from error
        raise _Refused(503, f"model {model!r} went away while it was loaded; try again", param="model")


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _race(receive: Receive, task: "asyncio.Task[Any]", tickets: Sequence[Ticket]) -> bool:
    """Wait for ``task``, or for the client to go: then everything is cancelled. Whether the task came to its end."""
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
        for ticket in tickets:
            ticket.cancel()
    return not task.cancelled()


async def _whole(
    request: Request, answer: Answer, tickets: Sequence[Ticket], echoes: Sequence[str], read: int
) -> Response:
    async def collect(ticket: Ticket) -> list[Event]:
        return [event async for event in ticket]

    task = asyncio.ensure_future(asyncio.gather(*map(collect, tickets)))
    if not await _race(request.receive, task, tickets):  # type: ignore[arg-type]  # a gathering future is awaitable too
        raise ClientDisconnect
    found: list[list[Event]] = task.result()
    for events in found:
        if events[-1].finish in ("error", "cancelled"):
            raise _Refused(500, events[-1].error or "the request was cancelled")
    choices = [answer.choice(i, events, echoes[i]) for i, events in enumerate(found)]
    return JSONResponse(answer.complete(choices, usage(read, sum(t.generated for t in tickets))))


async def _chunks(
    answer: Answer, tickets: Sequence[Ticket], echoes: Sequence[str], read: int | None
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a stream; ``read`` is the number of prompt tokens, where usage is asked for."""
    merged: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def pump(index: int, ticket: Ticket) -> None:
        async for event in ticket:
            merged.put_nowait((index, event))

    pumps = [asyncio.ensure_future(pump(i, ticket)) for i, ticket in enumerate(tickets)]
    try:
        for index, echo in enumerate(echoes):
            if (first := answer.first(index, echo)) is not None:
                yield answer.piece([first])
        running = len(tickets)
        while running:
            index, event = await merged.get()
            if event.finish in ("error", "cancelled"):
                yield failure(event.error or "the request was cancelled", "server_error")
                return
            running -= event.finish is not None
            if event.text or event.finish or answer.logprobs:
                yield answer.piece([answer.delta(index, event)])
        if read is not None:
            yield answer.piece([], usage(read, sum(t.generated for t in tickets)))
    finally:
        for one in pumps:
            one.cancel()


class _Stream(Response):
    """Server-sent events; what is still generated when the client goes is cancelled."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], tickets: Sequence[Ticket]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._tickets = chunks, tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._send(send))
        if await _race(receive, task, self._tickets) and (error := task.exception()) is not None:
            log.warning("a stream ended early: %r", error)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                line = f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
