"""Bytes of remote files: retries go on at the byte reached, and the file must stay the same one."""

import http.client
import itertools
import logging
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from dataclasses import dataclass

from mmssl.data.shards.urls import is_web
from mmssl.data.storage.filesystem import open_fsspec, write_fsspec
from mmssl.data.storage.http import PIECE, ReadInterruptedError, RemoteFile, open_web
from mmssl.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How long a remote file is waited for."""

    tries: int = 8
    """Tries in a row that bring less than 64 KiB before a read is given up."""
    backoff_seconds: float = 0.5
    """Pause after the first of them; it doubles each time, up to half a minute."""
    stall_seconds: float = 30.0
    """A connection that brings less than 64 KiB in this time is dropped."""


class Fetcher:
    """Reads remote files over HTTP or fsspec. Safe to share between threads."""

    def __init__(self, retry_policy: RetryPolicy | None = None) -> None:
        self._patience = retry_policy or RetryPolicy()
        self._tags: dict[str, str] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.retries = 0
        """Reads that had to be taken up again."""

    def __reduce__(self) -> tuple[type["Fetcher"], tuple[RetryPolicy]]:
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
        if is_web(url):
            raise UserError(f"{url} cannot be written over HTTP; index the shards where they are stored")
        write_fsspec(url, content)

    def stop(self) -> None:
        """Let reads that break off end with a CancelledError from now on, instead of being taken up again."""
        self._stopped.set()

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
            except (ReadInterruptedError, OSError, http.client.HTTPException) as error:
                self._pause(url, 0, failures, error)
        raise AssertionError

    def stream(self, url: str) -> Generator[bytes, None, None]:
        """A whole file, piece by piece, whatever its size.

        Raises:
            UserError: like `read`; `RemoteFileMissingError` if there is no such file.
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
                raise ReadInterruptedError("the connection closed early")
            except (ReadInterruptedError, OSError, http.client.HTTPException) as error:
                failures = 0 if position - before >= PIECE else failures + 1
                self._pause(url, position, failures, error)

    def _open(self, url: str, start: int, stop: int | None) -> AbstractContextManager[RemoteFile]:
        if is_web(url):
            return open_web(url, start, stop, self._patience.stall_seconds)
        return open_fsspec(url, start, stop)

    def _check(self, url: str, opened: RemoteFile, size: int | None) -> int | None:
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
        retry_policy = self._patience
        reason = " ".join(str(error).split()) or type(error).__name__
        if failures >= retry_policy.tries:
            raise UserError(
                f"{url} cannot be read at byte {position} after {failures} tries: {reason}; "
                "check the network and your access, and resume"
            )
        with self._lock:
            self.retries += 1
        asked = error.pause if isinstance(error, ReadInterruptedError) else 0.0
        seconds = min(30.0, max(asked, retry_policy.backoff_seconds * 2.0 ** max(0, failures - 1)))
        _log.warning("%s broke off at byte %d (%s); trying again in %.1f s", url, position, reason, seconds)
        if self._stopped.wait(seconds):
            raise CancelledError


def _from(opened: RemoteFile, position: int, stop: int | None) -> Iterator[bytes]:
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
