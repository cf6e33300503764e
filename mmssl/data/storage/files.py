"""Where a worker reads shards: local files, or remote ones ahead of time."""

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmssl.data.shards.shard_index import ShardIndex
from mmssl.data.sources.patterns import is_remote
from mmssl.data.sources.reader import LocalFiles
from mmssl.data.storage.blocks import RemoteReader, Span
from mmssl.data.storage.cache import DiskCache
from mmssl.data.storage.fetch import Fetcher, RetryPolicy

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
