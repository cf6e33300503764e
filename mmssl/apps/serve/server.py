"""The application on a socket: uvicorn, made impatient with clients that send or read nothing."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmssl.apps.serve.guard import refuse
from mmssl.errors import UserError

KEEP_ALIVE_SECONDS = 5
"""Time for which a connection may stay open between requests."""
CONNECTIONS = 256
HEAD_BYTES = 16 << 10


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which itself waits for ever for the head of a request and for an answer to be read."""

    head_seconds = 10.0
    """Time in which a request's head must have arrived, from the opening of the connection or the head's first byte."""
    write_seconds = 20.0
    """Time for which a client may leave an answer unread."""
    most_connections = CONNECTIONS
    """Requests of further ones are refused."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = _Timer(self.loop)
        self._unread = _Timer(self.loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            self.app = refuse
        self._head.start(self.head_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Between requests, also while the rest of a refused body comes in.
        if self.cycle is None or self.cycle.response_complete:
            self._head.start(self.head_seconds, self.transport.abort)
        else:
            self._head.stop()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread.start(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.stop()
        self._unread.stop()
        super().connection_lost(exc)


class _Timer:
    """One call later, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, call: Callable[[], object]) -> None:
        """A timer that runs already goes on as it is."""
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise UserError(f"cannot listen on {host}:{port}: {reason}; give another --host or --port") from None


def make_server(
    app: FastAPI, protocol: type[ImpatientProtocol] = ImpatientProtocol, keep_alive: int = KEEP_ALIVE_SECONDS
) -> uvicorn.Server:
    """A server; `run(sockets=[...])` serves until it is interrupted."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_keep_alive=keep_alive,
            timeout_graceful_shutdown=5,
        )
    )
