"""The HTTP server: a middleware that refuses bad requests, and the application on a socket."""

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket

import uvicorn
from fastapi import FastAPI, HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmssl.apps.serve.limits import ServerLimits
from mmssl.errors import UserError

CONNECTIONS = 256
HEAD_BYTES = 16 << 10
"""Largest request line with its headers."""
HEADERS = 100
"""Headers of a request; browsers and proxies send 10 to 40."""
DRAIN_SECONDS = 2.0
DRAIN_BYTES = 256 << 20
"""Bytes of a refused body that are read and dropped, so that the client gets to read the answer."""
CLOSE = {"Connection": "close"}
RETRY = {"Retry-After": "1"}
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
"""Headers of every answer, beside the Content-Security-Policy."""
_log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware: checks Host, Origin, body size and the number of requests; adds security headers.

    Every refusal is JSON, `{"detail": ...}`. starlette's TrustedHostMiddleware is not used: it takes a list of names,
    cannot accept every IP address, and refuses in plain text.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits, policy: str) -> None:
        """`policy`: the Content-Security-Policy."""
        self.app = app
        self.limits = limits
        self.headers = {"Content-Security-Policy": policy, **SECURITY_HEADERS}
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_secured(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["method"] == "HEAD":  # answered as GET; servers send no body for it
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        problem = _check_head(scope) or self._check(headers)
        if problem is None:
            self._active += 1
            try:
                problem = await self._serve(scope, _limit_body(receive, self.limits), send_secured)
            finally:
                self._active -= 1
        elif "expect" not in headers:  # such a client waits for permission before it sends the body
            await _drain(receive)
        if problem is not None and not started:
            await problem(scope, receive, send_secured)

    def _check(self, headers: Headers) -> JSONResponse | None:
        """The refusal of a request, judging by its headers."""
        limits = self.limits
        if not _is_own_host(headers.get("host", ""), limits.hosts):
            # DNS rebinding: a page of another site, whose name now points to this address, sends its own name.
            return _problem(421, "unknown Host header; name it when the server is started: --allow-host NAME")
        origin = headers.get("origin")
        if origin is not None and not _is_own_host(origin.partition("://")[2], limits.hosts):
            return _problem(403, "requests from pages of other sites are refused")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limits.upload_bytes:
            return _problem(413, _too_large(limits))
        if self._active >= limits.requests:
            return _problem(503, "the server is busy; try again", RETRY)
        return None

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> JSONResponse | None:
        """Run the application; the answer to give instead if it fails."""
        try:
            async with asyncio.timeout(self.limits.body_seconds + self.limits.answer_seconds):
                await self.app(scope, receive, send)
        except TimeoutError:
            return _problem(503, "the answer took too long; try again", RETRY)
        except Exception:
            _log.exception("%s %s failed", scope["method"], scope["path"])
            return _problem(500, "the server failed; its log says why")
        return None


def _check_head(scope: Scope) -> JSONResponse | None:
    """The refusal of a request line and headers that are too large. The server checks those that arrive in pieces."""
    fields = [
        scope.get("raw_path") or b"",
        scope.get("query_string", b""),
        *(part for pair in scope["headers"] for part in pair),
    ]
    if len(scope["headers"]) > HEADERS or sum(map(len, fields)) > HEAD_BYTES:
        return _problem(431, f"the request has more than {HEADERS} headers, or {HEAD_BYTES:,} bytes of them")
    return None


def _limit_body(receive: Receive, limits: ServerLimits) -> Receive:
    """`receive` that raises an HTTPException when the body is too large (413) or arrives too slowly (408)."""
    received, complete = 0, False
    deadline = asyncio.get_running_loop().time() + limits.body_seconds

    async def receive_limited() -> Message:
        nonlocal received, complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, "the request took too long to arrive", CLOSE) from None
        received += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if received > limits.upload_bytes:
            if not complete:
                await _drain(receive)
            raise HTTPException(413, _too_large(limits), CLOSE)
        return message

    return receive_limited


async def _drain(receive: Receive) -> None:
    """Read and drop the rest of a body. If the connection were closed first, the client might not see the answer."""
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while dropped < DRAIN_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _too_large(limits: ServerLimits) -> str:
    return f"the upload has more than {limits.upload_bytes:,} bytes"


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, {**CLOSE, **(headers or {})})


def _is_own_host(authority: str, names: tuple[str, ...]) -> bool:
    """True if HOST or HOST:PORT is an address, localhost or one of the names. An address cannot be rebound."""
    host = authority.lower()
    if not _is_address(host):
        host = re.sub(r":[0-9]*\Z", "", host)
    return host == "localhost" or host in names or _is_address(host)


def _is_address(host: str) -> bool:
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        return False
    return True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise UserError(f"cannot listen on {host}:{port}: {reason}; give another --host or --port") from None


class Connection(H11Protocol):
    """A connection that makes place for a new one while it waits for a request.

    Uvicorn has no deadline for the first request of a connection, so idle ones would keep everybody else out.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Close the connection that has waited longest if there is no place."""
        self.waiting_since = self.loop.time()
        self.dropped = False
        held = [other for other in self.connections if isinstance(other, Connection) and not other.dropped]
        if self.limit_concurrency is not None and len(held) >= self.limit_concurrency - 1:
            waiting = [other for other in held if other.cycle is None or other.cycle.response_complete]
            if waiting:
                oldest = min(waiting, key=lambda other: other.waiting_since)
                oldest.dropped = True
                oldest.transport.abort()
        super().connection_made(transport)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.waiting_since = self.loop.time()
        super().on_response_complete()


def make_server(app: FastAPI, connections: int = CONNECTIONS) -> uvicorn.Server:
    """A server; `run(sockets=[...])` serves until it is interrupted.

    Args:
        connections: with fewer than this number open, a new one is served. Otherwise it takes the place of one that
            waits for a request, or gets status 503 if there is none.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=connections,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=5,
        )
    )
