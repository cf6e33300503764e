"""All samples of all sources, numbered: from a sample's number to its bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmssl.data.shards.shard_index import ShardIndex
from mmssl.data.sources.patterns import is_remote
from mmssl.data.storage.fetch import Fetcher, RetryPolicy
from mmssl.data.storage.remote_index import remote_offsets

_CACHED_OFFSETS = 16 << 20
"""Samples whose ranges are kept in memory (16 bytes each)."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SampleLocation:
    """Where a sample stands."""

    id: int
    """Its number over all sources."""
    shard: int
    """Number of its shard in the catalog."""
    ordinal: int
    """Its number among the usable samples of the shard."""
    start: int
    stop: int


class Catalog:
    """The shards of all sources in order. Numbers of samples count usable ones: shards in name order, each in
    file order."""

    def __init__(self, sources: Sequence[Sequence[ShardIndex]], retry_policy: RetryPolicy) -> None:
        self._patience = retry_policy
        self._fetcher = Fetcher(retry_policy)
        self.sources = tuple(tuple(source) for source in sources)
        self.shards = [index for source in self.sources for index in source]
        counts = [index.samples for index in self.shards]
        self._bounds = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._bases = np.cumsum([0, *(sum(i.samples for i in source) for source in self.sources)])
        kept = max(16, _CACHED_OFFSETS * len(counts) // max(1, sum(counts)))
        self._ranges = lru_cache(kept)(self._ranges_of)

    def __reduce__(self) -> tuple[type["Catalog"], tuple[Sequence[Sequence[ShardIndex]], RetryPolicy]]:
        return Catalog, (self.sources, self._patience)

    def is_remote(self, source: int) -> bool:
        """Whether any shard of a source is remote."""
        return any(is_remote(index.shard) for index in self.sources[source])

    def locations(self, source: int, numbers: Ints) -> list[SampleLocation]:
        """Where the samples of a source stand."""
        ids = numbers + self._bases[source]
        shards = np.searchsorted(self._bounds, ids, side="right") - 1
        return [self._location(int(i), int(shard)) for i, shard in zip(ids, shards, strict=True)]

    def _location(self, number: int, shard: int) -> SampleLocation:
        starts, stops = self._ranges(shard)
        ordinal = number - int(self._bounds[shard])
        return SampleLocation(number, shard, ordinal, int(starts[ordinal]), int(stops[ordinal]))

    def _ranges_of(self, shard: int) -> tuple[Ints, Ints]:
        index = self.shards[shard]
        return index.usable(remote_offsets(index, self._fetcher)) if is_remote(index.shard) else index.ranges()
