"""The application on a socket: uvicorn, made impatient with clients that send or read nothing."""

import asyncio
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmssl.types import UserError

HEAD_SECONDS = 10.0
"""Time in which a request's head must have arrived, from the opening of the connection or the head's first byte."""
WRITE_SECONDS = 20.0
"""Time for which a client may leave an answer unread."""
KEEP_ALIVE_SECONDS = 5
CONNECTIONS = 256
HEAD_BYTES = 16 << 10


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which itself waits for ever for the head of a request and for an answer to be read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Between requests, also while the rest of a refused body comes in.
        if self.cycle is None or self.cycle.response_complete:
            if self._head is None:
                self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
        else:
            self._head = _stopped(self._head)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = _stopped(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._unread = _stopped(self._head), _stopped(self._unread)
        super().connection_lost(exc)


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


def make_server(app: FastAPI) -> uvicorn.Server:
    """A server; `run(sockets=[...])` serves until it is interrupted."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=ImpatientProtocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
        )
    )


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
