"""The files of a worker: local ones, and remote ones that are fetched ahead of their use."""

import os
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.data.shards import SampleLimits, ShardIndex, is_remote
from mmssl.data.shards.samples import SampleError
from mmssl.data.storage.blocks import RemoteReader, Span
from mmssl.data.storage.disk_cache import DiskCache
from mmssl.data.storage.fetch import Fetcher, RetryPolicy
from mmssl.data.storage.resized import ResizedSamples, Shrunk
from mmssl.data.transforms import decoding
from mmssl.errors import UserError
from mmssl.files import regular_handle

_OPEN_FILES = 256
"""Shards that all workers of a process keep open together: a quarter of the limit on Linux (1,024)."""


class LocalFiles:
    """Positioned reads of local files. The most recently used ones stay open. Not thread-safe."""

    def __init__(self, most: int = 64) -> None:
        """At most `most` files stay open."""
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
            self._open[shard] = regular_handle(shard)
        except OSError as error:
            raise UserError(f"shard {shard} cannot be opened: {error.strerror}; restore it and resume") from None
        if len(self._open) > self._most:
            os.close(self._open.popitem(last=False)[1])
        return self._open[shard]


@dataclass(frozen=True)
class Access:
    """Options of reading shards; every worker gets a copy."""

    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    chunks: DiskCache | None = None
    """Keeps remote shards as they are."""
    resized: ResizedSamples | None = None
    """Keeps samples of local and remote shards with their images shrunk."""
    open_local: Callable[[int], LocalFiles] = LocalFiles
    """Opens local files, at most the given number at a time."""

    @classmethod
    def keeping(
        cls,
        folder: Path,
        max_bytes: int,
        side: int | None = None,
        limits: SampleLimits | None = None,
        max_pixels: int = decoding.MAX_PIXELS,
    ) -> "Access":
        """Access that keeps what it reads in a folder.

        Args:
            side: keep samples with their images shrunk to this shorter side. None: remote shards as they are.
            limits, max_pixels: of these samples.

        Raises:
            UserError: the folder cannot be created.
        """
        if side is None:
            return cls(chunks=DiskCache(folder, max_bytes, "remove"))
        form = Shrunk(side, limits or SampleLimits(), max_pixels)
        return cls(resized=ResizedSamples(DiskCache(folder, max_bytes, "stop"), form))

    def open(self, sharing: int = 1, reading: NDArray[np.int64] | None = None) -> "Files":
        """The files of one worker, of `sharing` workers in this process, which reports its reads in `reading`."""
        open_files = max(4, min(64, _OPEN_FILES // sharing))
        return Files(self, open_files, np.zeros(3, dtype=np.int64) if reading is None else reading)


class Files:
    """Reads of shards for one worker. Not thread-safe."""

    def __init__(self, access: Access, open_files: int, reading: NDArray[np.int64]) -> None:
        self._access = access
        self._local = access.open_local(open_files)
        self._remote: RemoteReader | None = None
        self._prefetched: dict[Hashable, Hashable] = {}
        self.reading = reading
        """Shard number, byte and start (monotonic nanoseconds, 0 when idle) of the current read, int64 [3]."""
        self.fetcher = Fetcher(access.retry_policy)
        self.sample_bytes = 0
        """Bytes that `read_sample` read so far, from shards or from the cache."""
        self.streams: dict[Hashable, Generator[Any, None, None]] = {}
        """Open streams over shards without an index."""

    @property
    def retries(self) -> int:
        """Remote reads that were resumed."""
        return self.fetcher.retries

    def read(self, shard: ShardIndex, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard.

        Raises:
            UserError: the shard is gone, changed or out of reach.
            SampleError: these bytes of a local shard cannot be read.
        """
        if is_remote(shard.shard):
            return self._open_remote().read(shard, start, stop)
        return self._local.read(shard.shard, start, stop)

    def read_sample(self, shard: ShardIndex, start: int, stop: int) -> bytes:
        """The tar members of the sample in bytes [start, stop) of a shard, with its images shrunk if that is asked for.

        Raises: as `read`.
        """
        resized = self._access.resized
        kept = None if resized is None else resized.get(shard, start, stop)
        content = self.read(shard, start, stop) if kept is None else kept
        self.sample_bytes += len(content)
        return content if resized is None or kept is not None else resized.keep(shard, start, stop, content)

    def has_prefetched(self, reader: Hashable, blocks: Hashable) -> bool:
        """True if `blocks` are the last ones that `reader` prefetched."""
        return self._prefetched.get(reader) == blocks

    def prefetch(self, reader: Hashable, blocks: Hashable, spans: Sequence[Span]) -> None:
        """Start fetching the remote bytes of the samples that `reader` reads next, but for those that are kept."""
        self._prefetched[reader] = blocks
        resized = self._access.resized
        if resized is not None:
            spans = [span for span in spans if not resized.has(span.shard, span.start, span.stop)]
        self._open_remote().prefetch(reader, spans)

    def stop(self) -> None:
        """Do not resume fetches that break off from now on. May be called from another thread."""
        self.fetcher.stop()

    def abandon(self) -> None:
        """Start no fetch and resume none, without waiting for those under way. May be called from another thread."""
        self.stop()
        if self._remote is not None:
            self._remote.abandon()

    def close(self) -> None:
        """Close every file, connection and stream."""
        self.stop()
        for stream in self.streams.values():
            stream.close()
        self.streams.clear()
        self._local.close()
        if self._remote is not None:
            self._remote.close()

    def _open_remote(self) -> RemoteReader:
        if self._remote is None:
            self._remote = RemoteReader(self.fetcher, self._access.chunks)
        return self._remote
