"""The routes of the server, and who may call them."""

import asyncio
import hmac
import json
import logging
import socket
import time
import uuid
from contextlib import asynccontextmanager, suppress

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from .engine import STOPPED, Answer, Engine, Job, take_error
from .errors import RequestError, too_large
from .requests import ChatRequest, read_request
from .settings import ServerSettings


CHAT = "/v1/chat/completions"
LOCAL = {"localhost", "127.0.0.1", "::1"}
OPEN_PATHS = {"/health"}  # without a key
HEAD_SECONDS = 30  # in which a connection must have sent the head of its next request
READ_SECONDS = 120  # in which a request must have come in
SEND_SECONDS = 60  # in which a client must take the next piece of an answer
DRAIN_SECONDS = 5  # in which what a client still sends is thrown away, so that it sees why it was refused
SHUTDOWN_SECONDS = 10
BODIES_AT_ONCE = 4  # times `max_request_bytes`: what may be in memory of requests that are read or answered
BUSY = {"Retry-After": "2"}
GONE = RequestError(499, "the client has gone away.")

logger = logging.getLogger(__name__)


def create_app(model, processor, settings: ServerSettings) -> FastAPI:
    """
    The server as an ASGI application.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model.
        processor (`VideoPandaProcessor`):
            Its processor, with a chat template.
        settings (`ServerSettings`):
            What the server allows.

    Returns:
        `FastAPI`: the application, with `/v1/chat/completions`, `/v1/models` and `/health`.

    Raises:
        ValueError: if the processor has no chat template.
    """
    if processor.chat_template is None:
        raise ValueError("the processor has no chat template, which a server needs")
    engine = Engine(model, processor, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        engine.close()

    # No pages of documentation: they would fetch scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine = engine
    description = {
        "id": settings.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "video-panda",
    }

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [description]}

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await answer(request, engine)

    @app.exception_handler(RequestError)
    async def on_request_error(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def on_http_error(request: Request, error) -> Response:
        told = RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        return JSONResponse(told.body, error.status_code, getattr(error, "headers", None))

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> Response:
        return JSONResponse(RequestError(500, "the server failed; its log has the reason.").body, 500)

    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(Gate, settings=settings)
    return app


def run(app: FastAPI, sock: socket.socket, log_level: str = "warning") -> None:
    """Serves on a bound socket until Ctrl-C (then `KeyboardInterrupt`) or SIGTERM; answers that have begun may end."""
    handler = logging.StreamHandler()  # to standard error, the log of requests too
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    for name in ("uvicorn", "video_panda_hf"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(log_level.upper())
    new_server(app, log_level).run(sockets=[sock])


class Server(uvicorn.Server):
    """Gives answers that have begun some time to end once the server is told to."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(SHUTDOWN_SECONDS, self.config.app.state.engine.close)
        await super().shutdown(sockets)


class Connection(H11Protocol):
    """A connection that is closed if it sends no request: as many as a process may open would shut out everybody."""

    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._wait_for_another_than(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        self._wait_for_another_than(answered)

    def _wait_for_another_than(self, answered) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
        self.waiting = self.loop.call_later(HEAD_SECONDS, self._end_unless_another_than, answered)

    def _end_unless_another_than(self, answered) -> None:
        if self.cycle is answered:
            self.transport.close()


def new_server(app: FastAPI, log_level: str = "warning") -> Server:
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=log_level in ("debug", "info"),
        log_level=log_level,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS + 5,
    )
    return Server(config)


class Gate:
    """Lets a request in, or refuses it before its body is read. A request is inside until its answer has been sent."""

    def __init__(self, app, settings: ServerSettings):
        self.app, self.settings = app, settings
        self.hosts = LOCAL | {host.lower() for host in settings.allowed_hosts}
        self.inside = self.bytes_inside = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_soon(message) -> None:
            await asyncio.wait_for(send(message), SEND_SECONDS)

        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        try:
            self._check_caller(scope, headers)
            size = self._size(headers) if scope["path"] == CHAT and scope["method"] == "POST" else None
            self._check_room(size)
        except RequestError as error:
            await refuse(error, receive, send_soon)
            return
        if size is None:
            await self.app(scope, receive, send_soon)
            return
        self.inside += 1
        self.bytes_inside += size
        try:
            await self.app(scope, receive, send_soon)
        except asyncio.TimeoutError:
            logger.warning("a client did not take its answer")
            raise
        finally:
            self.inside -= 1
            self.bytes_inside -= size

    def _check_caller(self, scope, headers: list[tuple[bytes, str]]) -> None:
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:  # RFC 9112, 6.1
            raise RequestError(400, "a request has a Content-Length or a Transfer-Encoding, not both.")
        hosts = [value for name, value in headers if name == b"host"]
        host = host_of(hosts[0]) if len(hosts) == 1 else ""
        # The address at which the request arrived is no name, so no page of a stranger can have got here by it.
        arrived_at = (scope.get("server") or ("",))[0]
        if "*" not in self.hosts and host not in self.hosts and host != arrived_at:
            raise RequestError(
                403, "the Host header names another host (this server's operator may allow it by --allowed-host)."
            )
        if self.settings.api_key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        keys = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = keys[0].partition(" ") if len(keys) == 1 else ("", "", "")
        is_right = hmac.compare_digest(key.strip().encode("latin-1"), self.settings.api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            headers = {"WWW-Authenticate": "Bearer"}
            raise RequestError(
                401, "this server needs its API key, as Authorization: Bearer KEY.", None, None, headers
            )

    def _size(self, headers: list[tuple[bytes, str]]) -> int:
        """The size of the body, or the most that it may be."""
        named = dict(headers)
        if named.get(b"content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "a request is JSON: send Content-Type: application/json.")
        limit = self.settings.max_request_bytes
        declared = named.get(b"content-length", "")
        size = int(declared) if declared.isdecimal() else limit
        if size > limit:
            raise too_large("the size of the request in bytes", size, limit)
        return size

    def _check_room(self, size: int | None) -> None:
        if size is None:
            return
        room = BODIES_AT_ONCE * self.settings.max_request_bytes
        if self.inside >= self.settings.max_requests or self.bytes_inside + size > room:
            raise RequestError(503, "too many requests are waiting; try again.", None, "busy", BUSY)


def host_of(header: str) -> str:
    """The host in a `Host` header, without its port."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and ":" in host else host


async def refuse(error: RequestError, receive, send) -> None:
    """Answers a request whose body is not read, and closes the connection once the client has stopped sending."""
    body = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    pairs = [(name.lower().encode(), value.encode()) for name, value in {**headers, **error.headers}.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": True})

    async def drain() -> None:
        while (message := await receive())["type"] == "http.request" and message.get("more_body"):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(drain(), DRAIN_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def read_body(request: Request, limit: int) -> bytes:
    async def parts() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large("the size of the request in bytes is at least", len(body), limit)
        return bytes(body)

    try:
        return await asyncio.wait_for(parts(), READ_SECONDS)
    except asyncio.TimeoutError:
        raise RequestError(408, f"the request did not come in within {READ_SECONDS} seconds.") from None
    except ClientDisconnect:
        raise GONE from None


async def answer(request: Request, engine: Engine) -> Response:
    """The answer to a request, or the response that streams it."""
    settings = engine.settings
    body = await read_body(request, settings.max_request_bytes)
    asked = await asyncio.to_thread(read_request, body, settings)
    del body
    job = Job(engine, asked)
    job.leaving = leaving = asyncio.ensure_future(until_gone(request))
    is_streaming = False
    try:
        inputs = await unless(leaving, job.prepare())
        if asked.stream:
            is_streaming = True
            return EventStream(job, inputs, leaving)
        found = await unless(leaving, job.generate(inputs, lambda text: None))
        return JSONResponse(completion(asked, found))
    finally:
        if not is_streaming:
            leaving.cancel()
            await job.close()


async def until_gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless(leaving: asyncio.Future, work):
    """What `work` gives, unless the client goes away or the server ends (which cancels `leaving`) first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise STOPPED if leaving.cancelled() else GONE
        return task.result()
    finally:
        task.cancel()
        task.add_done_callback(take_error)


def completion(asked: ChatRequest, found: Answer) -> dict:
    message = {"role": "assistant", "content": found.text}
    choice = {"index": 0, "message": message, "finish_reason": found.finish_reason, "logprobs": None}
    return {**heading(asked, "chat.completion"), "choices": [choice], "usage": found.usage}


def heading(asked: ChatRequest, kind: str) -> dict:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}


class EventStream(Response):
    """An answer as server-sent events, while it is generated."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, inputs, leaving: asyncio.Future):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.job, self.inputs, self.leaving = job, inputs, leaving
        self.heading = heading(job.asked, "chat.completion.chunk")
        options = job.asked.stream_options
        self.with_usage = options is not None and options.include_usage

    async def __call__(self, scope, receive, send) -> None:
        async def event(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks():
                    await event(json.dumps(chunk))
                await event("[DONE]")
            except RequestError as error:
                if error is GONE:
                    return
                await event(json.dumps(error.body))
            except (OSError, asyncio.TimeoutError, asyncio.CancelledError):  # the client, or the end of the server
                raise
            except Exception:
                logger.exception("an answer failed")
                await event(json.dumps(RequestError(500, "the server failed; its log has the reason.").body))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.leaving.cancel()
            await self.job.close()

    async def _chunks(self):
        pieces: asyncio.Queue = asyncio.Queue()
        work = asyncio.ensure_future(unless(self.leaving, self.job.generate(self.inputs, pieces.put_nowait)))
        work.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            while (piece := await pieces.get()) is not None:
                yield self._chunk({"content": piece})
            found = work.result()
            yield self._chunk({}, found.finish_reason)
            if self.with_usage:
                yield {**self.heading, "choices": [], "usage": found.usage}
        finally:
            work.cancel()

    def _chunk(self, delta: dict, finish_reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        usage = {"usage": None} if self.with_usage else {}
        return {**self.heading, "choices": [choice], **usage}
