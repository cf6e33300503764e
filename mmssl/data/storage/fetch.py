"""Bytes of remote files. Retries resume at the current byte, and a file that changes is an error."""

import http.client
import itertools
import logging
import socket
import threading
import urllib.error
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
    """Limits of retries and waiting for remote files."""

    tries: int = 8
    """Consecutive attempts with less than 64 KiB of progress before a read fails."""
    backoff_seconds: float = 0.5
    """Pause after the first failed attempt; it doubles each time, up to 30 seconds."""
    stall_seconds: float = 30.0
    """A connection that delivers less than 64 KiB in this time is dropped."""


class Fetcher:
    """Reads remote files over HTTP or fsspec. Safe to share between threads."""

    def __init__(self, retry_policy: RetryPolicy | None = None) -> None:
        self._retry_policy = retry_policy or RetryPolicy()
        self._tags: dict[str, str] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._reached = threading.Event()
        self.retries = 0
        """Reads that were resumed."""

    def __reduce__(self) -> tuple[type["Fetcher"], tuple[RetryPolicy]]:
        return Fetcher, (self._retry_policy,)

    def read(self, url: str, start: int, stop: int, size: int) -> bytes:
        """Bytes [start, stop) of a file that has `size` bytes.

        Raises:
            UserError: the file is missing or changed, the server does not support ranges, or all retries failed.
        """
        content = bytearray()
        for piece in self._persist(url, start, stop, size):
            content += piece
        return bytes(content)

    def write(self, url: str, content: bytes) -> None:
        """Write a file.

        Raises:
            UserError: the file system cannot be written.
        """
        if is_web(url):
            raise UserError(f"{url} cannot be written over HTTP; index the shards where they are stored")
        write_fsspec(url, content)

    def stop(self) -> None:
        """Raise CancelledError for reads that break off from now on, instead of resuming them."""
        self._stopped.set()

    def size(self, url: str) -> int:
        """Bytes of a file.

        Raises:
            UserError: like `read`, or the server does not report it.
        """
        for failures in itertools.count(1):
            try:
                with self._open(url, 0, 1) as opened:
                    self._reached.set()
                    if opened.size is not None:
                        return opened.size
                raise UserError(f"{url}: the server does not report its size; copy the shards to a disk")
            except (ReadInterruptedError, OSError, http.client.HTTPException) as error:
                self._pause(url, 0, failures, error)
        raise AssertionError

    def stream(self, url: str) -> Generator[bytes, None, None]:
        """A complete file, piece by piece.

        Raises:
            UserError: like `read`; `RemoteFileMissingError` if it does not exist.
        """
        return self._persist(url, 0, None, None)

    def _persist(self, url: str, start: int, stop: int | None, size: int | None) -> Generator[bytes, None, None]:
        """Pieces of [start, stop); reopens the file where a read breaks off."""
        position, failures = start, 0
        while stop is None or position < stop:
            before = position
            try:
                with self._open(url, position, stop) as opened:
                    self._reached.set()
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
            return open_web(url, start, stop, self._retry_policy.stall_seconds)
        return open_fsspec(url, start, stop)

    def _check(self, url: str, opened: RemoteFile, size: int | None) -> int | None:
        """The size of the file. Raises UserError if the size or the ETag has changed."""
        if size is not None and opened.size is not None and size != opened.size:
            raise UserError(f"{url} has {opened.size} bytes, expected {size}: it changed; index it again")
        if opened.tag is not None:
            with self._lock:
                known = self._tags.setdefault(url, opened.tag)
            if known != opened.tag:
                raise UserError(f"{url} changed while it was read (ETag {known}, then {opened.tag}); start again")
        return opened.size if size is None else size

    def _pause(self, url: str, position: int, failures: int, error: Exception) -> None:
        policy = self._retry_policy
        unknown = _unknown_host(error)
        if unknown is not None and not self._reached.is_set():
            raise UserError(
                f"{url}: its host is not known ({unknown.strerror}); correct the address, or check the network"
            )
        reason = " ".join(str(error).split()) or type(error).__name__
        if failures >= policy.tries:
            raise UserError(
                f"{url} cannot be read at byte {position} after {failures} tries: {reason}; "
                "check the network and your access, and resume"
            )
        with self._lock:
            self.retries += 1
        requested = error.pause if isinstance(error, ReadInterruptedError) else 0.0
        seconds = min(30.0, max(requested, policy.backoff_seconds * 2.0 ** max(0, failures - 1)))
        _log.warning("%s broke off at byte %d (%s); trying again in %.1f s", url, position, reason, seconds)
        if self._stopped.wait(seconds):
            raise CancelledError


def _unknown_host(error: BaseException | None) -> socket.gaierror | None:
    """The failed look-up of a host's name among the causes of an error, whatever driver wraps it."""
    while error is not None:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, socket.gaierror):
            return cause
        error = error.__cause__ or error.__context__
    return None


def _from(opened: RemoteFile, position: int, stop: int | None) -> Iterator[bytes]:
    """The bytes of the pieces in [position, stop)."""
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
