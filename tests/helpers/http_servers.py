"""A web server on loopback that misbehaves as it is told."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Mischief:
    """What the server does wrong. Counts are of the requests for `.tar` files still to be spoilt."""

    fail: int = 0
    """Answers with `status`."""
    status: int = 503
    retry_after: str | None = None
    cut: int = 0
    """Answers that close after `cut_after` bytes."""
    cut_after: int = 100
    stall: int = 0
    """Answers that stop after `cut_after` bytes and hold the connection."""
    drip: int = 0
    """Answers that bring a byte at a time, slowly."""
    shift: int = 0
    """Answers with other bytes than asked for."""
    no_ranges: bool = False
    """Ranges are ignored."""
    no_tags: bool = False
    requests: list[str] = field(default_factory=list)
    """`PATH RANGE` of every request."""


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_GET(self) -> None:
        """Serve a file or mischief."""
        mischief, name = self.server.mischief, self.path.partition("?")[0].lstrip("/")
        wanted = self.headers.get("Range")
        mischief.requests.append(f"{name} {wanted}")
        path = self.server.folder / name
        spoil = self._take if name.endswith(".tar") else lambda what: False
        if spoil("fail"):
            self.send_response(mischief.status)
            if mischief.retry_after is not None:
                self.send_header("Retry-After", mischief.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif not path.is_file():
            self.send_error(404)
        else:
            self._send(path.read_bytes(), None if mischief.no_ranges else wanted, spoil)

    def _send(self, content: bytes, wanted: str | None, spoil: Callable[[str], bool]) -> None:
        mischief, size = self.server.mischief, len(content)
        start, stop = 0, size
        if wanted is not None:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(size, int(last) + 1 if last else size)
            if start >= size:
                self.send_error(416)
                return
            start += spoil("shift")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        if not mischief.no_tags:
            self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        content = content[start:stop]
        if spoil("cut"):
            self.wfile.write(content[: mischief.cut_after])
            self.close_connection = True
        elif spoil("stall"):
            self.wfile.write(content[: mischief.cut_after])
            self.server.stopped.wait(20)
        elif spoil("drip"):
            for byte in content:
                if self.server.stopped.is_set():
                    return
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(content)

    def _take(self, what: str) -> bool:
        with self.server.lock:
            left: int = getattr(self.server.mischief, what)
            setattr(self.server.mischief, what, max(0, left - 1))
        return left > 0

    def log_message(self, *message: object) -> None:
        """Stay silent."""


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, folder: Path, mischief: Mischief) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.mischief = mischief
        self.stopped = threading.Event()
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are the point."""


@contextmanager
def serve(folder: Path, mischief: Mischief | None = None) -> Iterator[str]:
    """Serve a folder; gives its URL."""
    server = _Server(folder, mischief or Mischief())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()
