"""Bytes of remote files: retries go on at the byte reached, and the file must stay the same one."""

import http.client
import itertools
import logging
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import fsspec

from mmssl.types import UserError

_PIECE = 64 << 10
_FSSPEC_PIECE = 8 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP answers that may be another one later."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a remote file is waited for."""

    tries: int = 8
    """Tries in a row that bring less than 64 KiB before a read is given up."""
    backoff_seconds: float = 0.5
    """Pause after the first of them; it doubles each time, up to half a minute."""
    stall_seconds: float = 30.0
    """A connection that brings less than 64 KiB in this time is dropped."""


class BrokenOffError(Exception):
    """A read ended early for a reason that may pass. `pause` is what the server asked for, in seconds."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class MissingError(UserError):
    """There is no such file."""


@dataclass(frozen=True)
class Opened:
    """A file being read."""

    begin: int
    """Where its bytes begin."""
    size: int | None
    """Bytes of the whole file, where the server tells."""
    tag: str | None
    """Changes with the content, where the server tells."""
    pieces: Iterator[bytes]


class Fetcher:
    """Reads remote files over HTTP or fsspec. Safe to share between threads."""

    def __init__(self, patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self._tags: dict[str, str] = {}
        self._lock = threading.Lock()
        self.retries = 0
        """Reads that had to be taken up again."""

    def __reduce__(self) -> tuple[type["Fetcher"], tuple[Patience]]:
        return Fetcher, (self._patience,)

    def read(self, url: str, start: int, stop: int, size: int) -> bytes:
        """Bytes [start, stop) of a file that has `size` bytes.

        Raises:
            UserError: the file is gone or another one, the server does not serve ranges, or it was given up.
        """
        content = bytearray()
        for piece in self._persist(url, start, stop, size):
            content += piece
        return bytes(content)

    def write(self, url: str, content: bytes) -> None:
        """Write a whole file.

        Raises:
            UserError: the file system cannot be written.
        """
        if url.startswith(("http://", "https://")):
            raise UserError(f"{url} cannot be written over HTTP; index the shards where they are stored")
        filesystem, path = _driver(url)
        try:
            with _driver_errors():
                filesystem.pipe_file(path, content)
        except (OSError, BrokenOffError) as error:
            raise UserError(f"{url} cannot be written: {error}; check your access") from None

    def size(self, url: str) -> int:
        """Bytes of a file.

        Raises:
            UserError: like `read`, or the server does not tell.
        """
        for failures in itertools.count(1):
            try:
                with self._open(url, 0, 1) as opened:
                    if opened.size is not None:
                        return opened.size
                raise UserError(f"{url}: the server does not tell its size; copy the shards to a disk")
            except (BrokenOffError, OSError, http.client.HTTPException) as error:
                self._pause(url, 0, failures, error)
        raise AssertionError

    def stream(self, url: str) -> Generator[bytes, None, None]:
        """A whole file, piece by piece, whatever its size.

        Raises:
            UserError: like `read`; `MissingError` if there is no such file.
        """
        return self._persist(url, 0, None, None)

    def _persist(self, url: str, start: int, stop: int | None, size: int | None) -> Generator[bytes, None, None]:
        """Pieces of [start, stop), opening the file again wherever it breaks off."""
        position, failures = start, 0
        while stop is None or position < stop:
            before = position
            try:
                with self._open(url, position, stop) as opened:
                    size = self._check(url, opened, size)
                    for piece in _from(opened, position, stop):
                        position += len(piece)
                        yield piece
                end = size if stop is None else stop
                if end is None or position == end:
                    return
                raise BrokenOffError("the connection closed early")
            except (BrokenOffError, OSError, http.client.HTTPException) as error:
                failures = 0 if position - before >= _PIECE else failures + 1
                self._pause(url, position, failures, error)

    def _open(self, url: str, start: int, stop: int | None) -> AbstractContextManager[Opened]:
        if url.startswith(("http://", "https://")):
            return _open_http(url, start, stop, self._patience.stall_seconds)
        return _open_fsspec(url, start, stop)

    def _check(self, url: str, opened: Opened, size: int | None) -> int | None:
        """The size of the file, which must be the one it had before."""
        if size is not None and opened.size is not None and size != opened.size:
            raise UserError(f"{url} has {opened.size} bytes, expected {size}: it changed; index it again")
        if opened.tag is not None:
            with self._lock:
                known = self._tags.setdefault(url, opened.tag)
            if known != opened.tag:
                raise UserError(f"{url} changed while it was read (ETag {known}, then {opened.tag}); start again")
        return opened.size if size is None else size

    def _pause(self, url: str, position: int, failures: int, error: Exception) -> None:
        patience = self._patience
        reason = " ".join(str(error).split()) or type(error).__name__
        if failures >= patience.tries:
            raise UserError(
                f"{url} cannot be read at byte {position} after {failures} tries: {reason}; "
                "check the network and resume"
            )
        with self._lock:
            self.retries += 1
        asked = error.pause if isinstance(error, BrokenOffError) else 0.0
        seconds = min(30.0, max(asked, patience.backoff_seconds * 2.0 ** max(0, failures - 1)))
        _log.warning("%s broke off at byte %d (%s); trying again in %.1f s", url, position, reason, seconds)
        time.sleep(seconds)


def _from(opened: Opened, position: int, stop: int | None) -> Iterator[bytes]:
    """The pieces' bytes in [position, stop)."""
    skip = position - opened.begin
    for piece in opened.pieces:
        kept = piece[skip:] if skip < len(piece) else b""
        skip = max(0, skip - len(piece))
        if stop is not None:
            kept = kept[: stop - position]
        position += len(kept)
        if kept:
            yield kept
        if position == stop:
            return


@contextmanager
def _open_http(url: str, start: int, stop: int | None, stall_seconds: float) -> Iterator[Opened]:
    headers = {"Accept-Encoding": "identity", "User-Agent": "mmssl"}
    if start > 0 or stop is not None:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=stall_seconds)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(url, error, start) from None
    with response:
        yield _opened(url, response, start, stop, stall_seconds)


def _opened(url: str, response: http.client.HTTPResponse, start: int, stop: int | None, stall_seconds: float) -> Opened:
    tag, length = response.headers.get("ETag"), response.headers.get("Content-Length")
    if response.status == 206:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            raise UserError(f"{url}: asked for bytes from {start}, the server sent others; copy the shards to a disk")
        return Opened(start, int(found[2]), tag, _pieces(response, stall_seconds))
    size = int(length) if length is not None and length.isdigit() else None
    if stop is not None and stop != size:
        raise UserError(f"{url}: the server does not serve byte ranges; copy the shards to a disk")
    return Opened(0, size, tag, _pieces(response, stall_seconds))


def _refusal(url: str, error: urllib.error.HTTPError, start: int) -> Exception:
    if error.code in _PASSING:
        asked = error.headers.get("Retry-After", "")
        return BrokenOffError(f"HTTP {error.code}", float(asked) if asked.isdigit() else 0.0)
    if error.code in (404, 410):
        return MissingError(f"{url} does not exist (HTTP {error.code}); correct the address")
    if error.code == 416:
        return UserError(f"{url} has no byte {start}: it changed; index it again")
    return UserError(f"{url} cannot be read (HTTP {error.code} {error.reason}); check the address and your access")


def _pieces(response: http.client.HTTPResponse, stall_seconds: float) -> Iterator[bytes]:
    begin, received = time.monotonic(), 0
    while piece := response.read1(_PIECE):
        received += len(piece)
        if received >= _PIECE:
            begin, received = time.monotonic(), 0
        elif time.monotonic() - begin > stall_seconds:
            raise BrokenOffError(f"fewer than 64 KiB came in {stall_seconds:.0f} s")
        yield piece


@contextmanager
def _open_fsspec(url: str, start: int, stop: int | None) -> Iterator[Opened]:
    filesystem, path = _driver(url)
    try:
        with _driver_errors():
            info = filesystem.info(path)
    except FileNotFoundError:
        raise MissingError(f"{url} does not exist; correct the address") from None
    except PermissionError as error:
        raise UserError(f"{url} cannot be read ({error}); check your access") from None
    tag = info.get("ETag") or info.get("etag")
    end = int(info["size"]) if stop is None else stop

    def pieces() -> Iterator[bytes]:
        for position in range(start, end, _FSSPEC_PIECE):
            with _driver_errors():
                piece = filesystem.cat_file(path, start=position, end=min(end, position + _FSSPEC_PIECE))
            yield piece

    yield Opened(start, int(info["size"]), None if tag is None else str(tag), pieces())


def _driver(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path in it."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        reason = " ".join(str(error).split())
        raise UserError(f"{url}: there is no driver for {protocol}:// ({reason}); install it") from None
    return filesystem, path


@contextmanager
def _driver_errors() -> Iterator[None]:
    """Drivers raise errors of many kinds; all but a missing file and a refused access may pass."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise BrokenOffError(f"{type(error).__name__}: {error}") from error
