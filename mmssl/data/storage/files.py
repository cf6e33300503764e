"""Where a worker reads shards: local files, or remote ones ahead of time."""

import os
from collections import OrderedDict
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmssl.data.shards.samples import SampleError
from mmssl.data.shards.shard_index import ShardIndex
from mmssl.data.shards.urls import is_remote
from mmssl.data.storage.blocks import DiskCache, RemoteReader, Span
from mmssl.data.storage.fetch import Fetcher, RetryPolicy
from mmssl.errors import UserError

_OPEN_FILES = 256
"""Shards that the workers of a process hold open together: a quarter of the files that Linux lets a process open."""


@dataclass(frozen=True)
class Access:
    """How shards are reached; goes to every worker."""

    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    cache_dir: Path | None = None
    """Folder that keeps what was read of remote shards."""
    cache_bytes: int = 100 << 30

    def open(self, sharing: int = 1) -> "Files":
        """What one worker reads with, of `sharing` that do so in this process."""
        return Files(self, max(4, min(64, _OPEN_FILES // sharing)))


class Files:
    """Reads of shards for one worker. Not for sharing between threads."""

    def __init__(self, access: Access, open_files: int) -> None:
        self._access = access
        self._local = LocalFiles(open_files)
        self._remote: RemoteReader | None = None
        self._expected: dict[Hashable, Hashable] = {}
        self.fetcher = Fetcher(access.retry_policy)
        self.streams: dict[Hashable, Generator[Any, None, None]] = {}
        """What is read from beginning to end, a part at a time."""

    @property
    def retries(self) -> int:
        """Remote reads that had to be taken up again."""
        return self.fetcher.retries

    def read(self, shard: ShardIndex, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard.

        Raises:
            UserError: the shard is gone, changed or out of reach.
            SampleError: these bytes of a local shard cannot be read.
        """
        if is_remote(shard.shard):
            return self._reach().read(shard, start, stop)
        return self._local.read(shard.shard, start, stop)

    def has_prefetched(self, reader: Hashable, what: Hashable) -> bool:
        """Whether `what` is the last thing that `reader` expected."""
        return self._expected.get(reader) == what

    def prefetch(self, reader: Hashable, what: Hashable, spans: Sequence[Span]) -> None:
        """Begin to fetch the remote bytes that `reader` reads next."""
        self._expected[reader] = what
        self._reach().prefetch(reader, spans)

    def stop(self) -> None:
        """Give up what is being fetched, where it breaks off; may be called from another thread."""
        self.fetcher.stop()

    def close(self) -> None:
        """Close every file, connection and stream."""
        self.stop()
        for stream in self.streams.values():
            stream.close()
        self.streams.clear()
        self._local.close()
        if self._remote is not None:
            self._remote.close()

    def _reach(self) -> RemoteReader:
        if self._remote is None:
            access = self._access
            cache = None if access.cache_dir is None else DiskCache(access.cache_dir, access.cache_bytes)
            self._remote = RemoteReader(self.fetcher, cache)
        return self._remote


class LocalFiles:
    """Positioned reads of local files, the most recently used of which stay open. Not for sharing between
    threads."""

    def __init__(self, most: int = 64) -> None:
        """At most so many files stay open."""
        self._most = most
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard.

        Raises:
            UserError: the file cannot be opened.
            SampleError: the bytes cannot be read.
        """
        file = self._file(shard)
        try:
            content = os.pread(file, stop - start, start)
            while len(content) < stop - start:
                more = os.pread(file, stop - start - len(content), start + len(content))
                if not more:
                    raise SampleError(f"the shard ends at byte {start + len(content)}; it changed since it was indexed")
                content += more
        except OSError as error:
            raise SampleError(f"bytes {start} to {stop} cannot be read: {error.strerror}") from None
        return content

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _file(self, shard: str) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        try:
            self._open[shard] = os.open(shard, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"shard {shard} cannot be opened: {error.strerror}; restore it and resume") from None
        if len(self._open) > self._most:
            os.close(self._open.popitem(last=False)[1])
        return self._open[shard]
