"""Files on web servers, over HTTP and HTTPS, and the errors of remote files."""

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mmssl.errors import UserError


@dataclass(frozen=True)
class RemoteFile:
    """An open remote file."""

    begin: int
    """Offset of the first byte of `pieces`."""
    size: int | None
    """Bytes of the complete file, if the server reports them."""
    tag: str | None
    """Version tag of the content (ETag), if the server reports one."""
    pieces: Iterator[bytes]


class ReadInterruptedError(Exception):
    """A read ended early for a temporary reason. `pause` is the delay the server requested, in seconds."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class RemoteFileMissingError(UserError):
    """The file is missing or access is denied; object stores do not distinguish the two."""


PIECE = 64 << 10
"""Most bytes per read, and least bytes a connection must deliver in time not to count as stalled."""
_TEMPORARY = (408, 425, 429, *range(500, 600))
"""HTTP status codes of temporary failures."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


@contextmanager
def open_web(url: str, start: int, stop: int | None, stall_seconds: float) -> Iterator[RemoteFile]:
    """A file from byte `start` to `stop` or its end; from byte 0 if the server ignores ranges.

    Raises:
        UserError: the file is missing, access is denied, or the server does not support ranges.
        ReadInterruptedError: the server refuses temporarily, or the connection stalls.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "mmssl"}
    if start > 0 or stop is not None:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=stall_seconds)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(url, error, start) from None
    except http.client.InvalidURL as error:
        raise UserError(f"{url} is not a valid URL ({error}); write spaces as %20") from None
    with response:
        yield _opened(url, response, start, stop, stall_seconds)


def _opened(
    url: str, response: http.client.HTTPResponse, start: int, stop: int | None, stall_seconds: float
) -> RemoteFile:
    tag, length = response.headers.get("ETag"), response.headers.get("Content-Length")
    if response.status == 206:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            raise UserError(f"{url}: asked for bytes from {start}, the server sent others; copy the shards to a disk")
        return RemoteFile(start, int(found[2]), tag, _pieces(response, stall_seconds))
    size = int(length) if length is not None and length.isdigit() else None
    if stop is not None and stop != size:
        raise UserError(f"{url}: the server does not serve byte ranges; copy the shards to a disk")
    return RemoteFile(0, size, tag, _pieces(response, stall_seconds))


def _refusal(url: str, error: urllib.error.HTTPError, start: int) -> Exception:
    if error.code in _TEMPORARY:
        requested = error.headers.get("Retry-After", "")
        return ReadInterruptedError(f"HTTP {error.code}", float(requested) if requested.isdigit() else 0.0)
    if error.code in (404, 410):
        return RemoteFileMissingError(f"{url} does not exist (HTTP {error.code}); correct the address")
    if error.code == 416:
        return UserError(f"{url} has no byte {start}: it changed; index it again")
    kind = RemoteFileMissingError if error.code in (401, 403) else UserError
    return kind(f"{url} cannot be read (HTTP {error.code} {error.reason}); check the address and your access")


def _pieces(response: http.client.HTTPResponse, stall_seconds: float) -> Iterator[bytes]:
    waited, received = 0.0, 0
    while True:
        # Only waiting for the server counts, not the time that the caller takes between two pieces.
        begin = time.monotonic()
        piece = response.read1(PIECE)
        waited += time.monotonic() - begin
        received += len(piece)
        if not piece:
            return
        if received >= PIECE:
            waited, received = 0.0, 0
        elif waited > stall_seconds:
            raise ReadInterruptedError(f"fewer than 64 KiB came in {stall_seconds:.0f} s")
        yield piece
