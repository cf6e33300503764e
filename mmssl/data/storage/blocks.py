"""Remote shards read in chunks: ahead of their use, many at a time, and kept on a local disk where that is
wanted."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from mmssl.data.shards.shard_index import ShardIndex
from mmssl.data.storage.cache import CHUNK, DiskCache
from mmssl.data.storage.fetch import Fetcher

_MOST = 16
"""Chunks fetched in one request."""
_SPARE = 64
"""Chunks kept in memory beyond those that are expected to be read."""
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
        """Begin to fetch what `reader` reads next; what it expected before is no longer needed."""
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
        """Bytes [start, stop) of a shard, waiting for them if need be."""
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
        """Drop what is being fetched."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._chunks.clear()

    def _chunk(self, chunk: Chunk) -> bytes:
        future, place = self._chunks[chunk]
        self._chunks.move_to_end(chunk)
        return future.result()[place]

    def _fetch(self, shard: ShardIndex, numbers: Sequence[int]) -> None:
        future = self._pool.submit(self._load, shard, numbers)
        for place, number in enumerate(numbers):
            self._chunks[shard.shard, number] = (future, place)

    def _load(self, shard: ShardIndex, numbers: Sequence[int]) -> list[bytes]:
        """Consecutive chunks, from the disk where they are there, else in as few requests as possible."""
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
        """Drop the chunks that nobody expects, but for the last ones used."""
        needed = frozenset().union(*self._expected.values())
        spare = [chunk for chunk in self._chunks if chunk not in needed]
        for chunk in spare[: max(0, len(spare) - _SPARE)]:
            del self._chunks[chunk]


def _runs(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Cut sorted chunks into runs of neighbours, `_MOST` long at most."""
    run: list[Chunk] = []
    for chunk in chunks:
        if run and (chunk != (run[-1][0], run[-1][1] + 1) or len(run) == _MOST):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run
