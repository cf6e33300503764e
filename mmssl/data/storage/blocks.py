"""Remote shards in chunks: fetched ahead of their use, many per request, and optionally cached on a local disk."""

import hashlib
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmssl.data.shards import ShardIndex
from mmssl.data.storage.fetch import Fetcher
from mmssl.errors import UserError
from mmssl.files import atomic_write

CHUNK = 1 << 20
"""Bytes per chunk; the last chunk of a shard may be shorter."""
_CHECKSUM_BYTES = 4
_MOST = 16
"""Chunks per request."""
_SPARE = 64
"""Chunks kept in memory beside the prefetched ones."""
_FETCHES = 4
"""Requests in flight."""

Chunk = tuple[str, int]
"""URL and number of a chunk."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a shard that will be read."""

    shard: ShardIndex
    start: int
    stop: int


class DiskCache:
    """A folder of chunks that many processes share. Above a size, the least recently used ones are removed."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises UserError when the folder cannot be created."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._free_bytes = 0
        self._warned = False
        self.sweeps = 0
        """Times the folder was listed to remove old files."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"data.cache_dir={folder} cannot be created: {error.strerror}; choose another folder"
            raise UserError(message) from None

    def get(self, shard: ShardIndex, number: int) -> bytes | None:
        """A chunk, or None if it is missing or damaged."""
        path = self._path(shard, number)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        chunk, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        if len(chunk) != min(CHUNK, shard.bytes - number * CHUNK) or checksum != _checksum(chunk):
            return None
        with suppress(OSError):  # the file belongs to another user
            os.utime(path)
        return chunk

    def put(self, shard: ShardIndex, number: int, chunk: bytes) -> None:
        """Store a chunk."""
        path = self._path(shard, number)
        try:
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, chunk + _checksum(chunk))
        except OSError as error:
            if not self._warned:
                _log.warning("%s cannot keep a chunk of %s: %s", self._folder, shard.shard, error.strerror)
            self._warned = True
            return
        self._free_bytes -= len(chunk) + _CHECKSUM_BYTES
        if self._free_bytes < 0:
            self._free_bytes = self.sweep()

    def sweep(self) -> int:
        """Remove the least recently used files if the folder is too large. Returns the bytes that may be written before
        the next sweep: a sixteenth of the free space, because other processes write too."""
        self.sweeps += 1
        files = []
        for path in self._folder.glob("*/*"):
            with suppress(OSError):  # another process removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        kept = sum(size for _, size, _ in files)
        if kept > self._max_bytes:
            # 5 % below the limit, so that sweeps are rare: one takes a second with 100,000 files.
            for _, size, path in sorted(files):
                if kept <= 0.95 * self._max_bytes:
                    break
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                    kept -= size
        return max(self._max_bytes // 256, (self._max_bytes - kept) // 16)

    def _path(self, shard: ShardIndex, number: int) -> Path:
        # The checksum of the index changes with the content of the URL.
        words = repr((shard.shard, shard.bytes, shard.checksum, number)).encode()
        name = hashlib.blake2b(words, digest_size=16).hexdigest()
        return self._folder / name[:2] / name


def _checksum(chunk: bytes) -> bytes:
    return zlib.crc32(chunk).to_bytes(_CHECKSUM_BYTES, "little")


class RemoteReader:
    """Reads of remote shards for one worker."""

    def __init__(self, fetcher: Fetcher, cache: DiskCache | None) -> None:
        self._fetcher = fetcher
        self._cache = cache
        self._chunks: OrderedDict[Chunk, tuple[Future[list[bytes]], int]] = OrderedDict()
        self._expected: dict[Hashable, frozenset[Chunk]] = {}
        self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="mmssl-fetch")

    def prefetch(self, reader: Hashable, spans: Sequence[Span]) -> None:
        """Start fetching the bytes that `reader` reads next. This replaces its previous request."""
        chunks: dict[Chunk, ShardIndex] = {}
        for span in spans:
            for number in range(span.start // CHUNK, -(-span.stop // CHUNK)):
                chunks[span.shard.shard, number] = span.shard
        self._expected[reader] = frozenset(chunks)
        missing = sorted(chunk for chunk in chunks if chunk not in self._chunks)
        for run in _runs(missing):
            self._fetch(chunks[run[0]], [number for _, number in run])
        self._forget()

    def read(self, shard: ShardIndex, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard; waits until they are fetched."""
        numbers = range(start // CHUNK, -(-stop // CHUNK))
        missing = [(shard.shard, number) for number in numbers if (shard.shard, number) not in self._chunks]
        for run in _runs(missing):
            self._fetch(shard, [number for _, number in run])
        content = b"".join(self._chunk((shard.shard, number)) for number in numbers)
        begin = start - numbers[0] * CHUNK if len(numbers) > 0 else 0
        if missing:
            self._forget()
        return content[begin : begin + stop - start]

    def close(self) -> None:
        """Cancel all fetches."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._chunks.clear()

    def abandon(self) -> None:
        """Cancel the fetches that have not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _chunk(self, chunk: Chunk) -> bytes:
        future, place = self._chunks[chunk]
        self._chunks.move_to_end(chunk)
        return future.result()[place]

    def _fetch(self, shard: ShardIndex, numbers: Sequence[int]) -> None:
        future = self._pool.submit(self._load, shard, numbers)
        for place, number in enumerate(numbers):
            self._chunks[shard.shard, number] = (future, place)

    def _load(self, shard: ShardIndex, numbers: Sequence[int]) -> list[bytes]:
        """Consecutive chunks, from the disk cache or in as few requests as possible."""
        cached = [None if self._cache is None else self._cache.get(shard, number) for number in numbers]
        wanted = [(shard.shard, number) for number, content in zip(numbers, cached, strict=True) if content is None]
        fetched = {}
        for run in _runs(wanted):
            first, last = run[0][1], run[-1][1]
            stop = min((last + 1) * CHUNK, shard.bytes)
            content = self._fetcher.read(shard.shard, first * CHUNK, stop, shard.bytes)
            for number in range(first, last + 1):
                fetched[number] = content[(number - first) * CHUNK : (number - first + 1) * CHUNK]
                if self._cache is not None:
                    self._cache.put(shard, number, fetched[number])
        pairs = zip(numbers, cached, strict=True)
        return [fetched[number] if content is None else content for number, content in pairs]

    def _forget(self) -> None:
        """Drop chunks that no reader has prefetched, except the most recently used ones."""
        needed = frozenset().union(*self._expected.values())
        spare = [chunk for chunk in self._chunks if chunk not in needed]
        for chunk in spare[: max(0, len(spare) - _SPARE)]:
            del self._chunks[chunk]


def _runs(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Split sorted chunks into runs of neighbours, at most `_MOST` long."""
    run: list[Chunk] = []
    for chunk in chunks:
        if run and (chunk != (run[-1][0], run[-1][1] + 1) or len(run) == _MOST):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run
