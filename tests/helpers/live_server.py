"""The application on a socket, in a thread of the tests' process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from mmssl.apps.serve import listen, make_server


@contextmanager
def serving(app: FastAPI, **options: Any) -> Iterator[tuple[int, uvicorn.Server]]:
    """A port at which it answers, and the server; `options` as of `make_server`."""
    with listen("127.0.0.1", 0) as listener:
        server = make_server(app, **options)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1], server
        finally:
            server.should_exit = True
            thread.join()


def connect(port: int) -> socket.socket:
    """A plain connection whose reads give up after a while, so that no test hangs."""
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes; a reset ends it too."""
    got = b""
    try:
        while piece := connection.recv(65536):
            got += piece
    except ConnectionResetError:
        return got
    return got
