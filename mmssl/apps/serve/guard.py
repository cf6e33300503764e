"""What every request passes before the application sees it: Host, Origin, size, time and number."""

import asyncio
import contextlib
import ipaddress
import logging

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmssl.apps.serve.limits import ServerLimits

LINGER_SECONDS = 2.0
LINGER_BYTES = 256 << 20
"""How much of the rest of a refused body is read and dropped, so that the client comes to read the answer."""
CLOSE = {"Connection": "close"}
LATER = {"Retry-After": "1"}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
"""Of every answer, beside the Content-Security-Policy."""
_log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware around the whole application. Every refusal is JSON, `{"detail": ...}`."""

    def __init__(self, app: ASGIApp, limits: ServerLimits, policy: str) -> None:
        """`policy`: the Content-Security-Policy."""
        self.app = app
        self.limits = limits
        self.headers = {"Content-Security-Policy": policy, **HEADERS}
        self._in_hand = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, self.headers)
        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        if refusal is not None:
            if "expect" not in headers:  # such a client sends its body only when it is asked to
                await _drain(receive)
            await refusal(scope, receive, answer.send)
            return
        self._in_hand += 1
        try:
            await self._pass(scope, receive, answer)
        finally:
            self._in_hand -= 1

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        limits = self.limits
        if not _known(headers.get("host"), limits.hosts):
            # A page of another site whose name was pointed at this address (DNS rebinding) comes with its own name.
            return _problem(421, "unknown Host header; name it when the server is started: --allow-host NAME")
        origin = headers.get("origin")
        if origin is not None and not _known(origin.partition("://")[2], limits.hosts):
            return _problem(403, "requests from pages of other sites are refused")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limits.upload_bytes:
            return _problem(413, too_large(limits))
        if self._in_hand >= limits.requests:
            return _busy()
        return None

    async def _pass(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        body = _Body(receive, self.limits)
        try:
            async with asyncio.timeout(self.limits.body_seconds + self.limits.answer_seconds):
                await self.app(scope, body.receive, answer.send)
        except TimeoutError:
            problem = _problem(503, "the answer took too long; try again", LATER)
        except Exception:
            _log.exception("%s %s failed", scope["method"], scope["path"])
            problem = _problem(500, "the server failed; its log says why")
        else:
            return
        if not answer.started:
            await problem(scope, receive, answer.send)


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application that is too busy for any request."""
    await _drain(receive)
    await _busy()(scope, receive, _Answer(send, HEADERS).send)


class _Body:
    """A request's body as it arrives, with an end to its size and time."""

    def __init__(self, receive: Receive, limits: ServerLimits) -> None:
        self._receive = receive
        self._limits = limits
        self._bytes = 0
        self._whole = False
        self._end = asyncio.get_running_loop().time() + limits.body_seconds

    async def receive(self) -> Message:
        """The next part.

        Raises:
            HTTPException: 413 when the body is too large, 408 when it is too slow.
        """
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._end):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the request took too long to arrive", CLOSE) from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._bytes > self._limits.upload_bytes:
                await _drain(self._receive, self._whole)
                raise HTTPException(413, too_large(self._limits), CLOSE)
        return message


class _Answer:
    """A response on its way out, to which the security headers are added."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self._headers = headers
        self.started = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            for name, value in self._headers.items():
                headers.setdefault(name, value)
        await self._send(message)


def too_large(limits: ServerLimits) -> str:
    """What is said of a body over the cap."""
    return f"the upload has more than {limits.upload_bytes:,} bytes"


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, {**CLOSE, **(headers or {})})


def _busy() -> JSONResponse:
    return _problem(503, "the server is busy; try again", LATER)


async def _drain(receive: Receive, whole: bool = False) -> None:
    """Read and drop what still comes of a body. A connection that is closed before is reset, and the client might not
    see the answer."""
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while not whole and dropped < LINGER_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                whole = message["type"] != "http.request" or not message.get("more_body", False)


def _known(authority: str | None, names: tuple[str, ...]) -> bool:
    """Whether HOST or HOST:PORT is an address, localhost or one of the names. An address cannot be rebound."""
    if authority is None:
        return False
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, ""
    if not (port.isdecimal() or port == ""):
        return False
    host = host.lower()
    if host == "localhost" or host in names:
        return True
    try:
        ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return False
    return True
