"""Remote shards in chunks: fetched ahead of their use, many per request, and optionally cached on a local disk."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from mmssl.data.shards import ShardIndex
from mmssl.data.storage.disk_cache import DiskCache, Name
from mmssl.data.storage.fetch import Fetcher

CHUNK = 1 << 20
"""Bytes per chunk; the last chunk of a shard may be shorter."""
_MOST = 16
"""Chunks per request."""
_SPARE = 64
"""Chunks kept in memory beside the prefetched ones."""
_FETCHES = 4
"""Requests in flight."""

Chunk = tuple[str, int]
"""URL and number of a chunk."""


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a shard that will be read."""

    shard: ShardIndex
    start: int
    stop: int


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
        cached = [None if self._cache is None else self._cache.get(chunk_name(shard, n)) for n in numbers]
        wanted = [(shard.shard, number) for number, content in zip(numbers, cached, strict=True) if content is None]
        fetched = {}
        for run in _runs(wanted):
            first, last = run[0][1], run[-1][1]
            stop = min((last + 1) * CHUNK, shard.bytes)
            content = self._fetcher.read(shard.shard, first * CHUNK, stop, shard.bytes)
            for number in range(first, last + 1):
                fetched[number] = content[(number - first) * CHUNK : (number - first + 1) * CHUNK]
                if self._cache is not None:
                    self._cache.put(chunk_name(shard, number), fetched[number])
        pairs = zip(numbers, cached, strict=True)
        return [fetched[number] if content is None else content for number, content in pairs]

    def _forget(self) -> None:
        """Drop chunks that no reader has prefetched, except the most recently used ones."""
        needed = frozenset().union(*self._expected.values())
        spare = [chunk for chunk in self._chunks if chunk not in needed]
        for chunk in spare[: max(0, len(spare) - _SPARE)]:
            del self._chunks[chunk]


def chunk_name(shard: ShardIndex, number: int) -> Name:
    """The name of a chunk in a cache. The checksum of the index changes with the content of the URL."""
    return shard.shard, shard.bytes, shard.checksum, number


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
