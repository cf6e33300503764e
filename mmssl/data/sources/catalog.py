"""Sources of shards: their indexes, their slices, and a catalog that locates each sample by its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmssl.data.order import PlannedSource, Slices, default_slice_bytes
from mmssl.data.shards import Progress, SampleLimits, ShardIndex, describe_problems, index_shards, is_remote
from mmssl.data.shards.index import fingerprint
from mmssl.data.shards.urls import is_command
from mmssl.data.storage import Access, Fetcher, RetryPolicy, find_remote_indexes, index_remote_shards, remote_offsets
from mmssl.errors import UserError

_CACHED_OFFSETS = 16 << 20
"""Samples whose ranges are kept in memory (16 bytes each)."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SampleLocation:
    """The location of a sample: bytes [start, stop) of a shard."""

    id: int
    """Number over all sources."""
    shard: int
    """Number of its shard in the catalog."""
    ordinal: int
    """Number among the usable samples of the shard."""
    start: int
    stop: int


class Catalog:
    """All shards of all sources. Usable samples are numbered by shard name, then in file order."""

    def __init__(self, sources: Sequence[Sequence[ShardIndex]], retry_policy: RetryPolicy) -> None:
        self._retry_policy = retry_policy
        self._fetcher = Fetcher(retry_policy)
        self.sources = tuple(tuple(source) for source in sources)
        self.shards = [index for source in self.sources for index in source]
        counts = [index.samples for index in self.shards]
        self._bounds = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._bases = np.cumsum([0, *(sum(i.samples for i in source) for source in self.sources)])
        kept = max(16, _CACHED_OFFSETS * len(counts) // max(1, sum(counts)))
        self._ranges = lru_cache(kept)(self._ranges_of)

    def __reduce__(self) -> tuple[type["Catalog"], tuple[Sequence[Sequence[ShardIndex]], RetryPolicy]]:
        return Catalog, (self.sources, self._retry_policy)

    def is_remote(self, source: int) -> bool:
        """True if any shard of a source is remote."""
        return any(is_remote(index.shard) for index in self.sources[source])

    def locations(self, source: int, numbers: Ints) -> list[SampleLocation]:
        """The locations of samples of a source."""
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


def index_source(
    shards: Sequence[str], limits: SampleLimits, access: Access, progress: Progress | None = None
) -> list[ShardIndex | None]:
    """The index of each shard; None for a remote one without an index beside it."""
    local = [shard for shard in shards if not is_remote(shard)]
    remote = [shard for shard in shards if is_remote(shard) and not is_command(shard)]
    found: dict[str, ShardIndex | None] = {i.shard: i for i in index_shards(local, limits, progress=progress)}
    indexes = find_remote_indexes(remote, limits, Fetcher(access.retry_policy))
    found.update(zip(remote, indexes, strict=True))
    return [found.get(shard) for shard in shards]


def make_index(
    shards: Sequence[str], limits: SampleLimits, access: Access, processes: int = 0, progress: Progress | None = None
) -> list[ShardIndex]:
    """Index local and remote shards where needed, and store the index beside them.

    Raises:
        UserError: a shard is out of reach or is a command, or a remote file system cannot be written.
    """
    commands = [shard for shard in shards if is_command(shard)]
    if commands:
        raise UserError(f"{commands[0]!r} is a command, which cannot be indexed; give files")
    remote = [shard for shard in shards if is_remote(shard)]
    local = [shard for shard in shards if not is_remote(shard)]
    found = {i.shard: i for i in index_shards(local, limits, processes=processes, progress=progress)}
    found.update((i.shard, i) for i in index_remote_shards(remote, limits, Fetcher(access.retry_policy), progress))
    return [found[shard] for shard in shards]


def plan_source(indexes: Sequence[ShardIndex], weight: float, slice_mib: float | None) -> PlannedSource:
    """Cut a source into slices.

    Raises:
        UserError: no sample of it is usable.
    """
    counts, sizes = [index.samples for index in indexes], [index.bytes for index in indexes]
    if sum(counts) == 0:
        found = describe_problems(indexes) or "they are empty"
        raise UserError(f"no usable sample in {indexes[0].shard} and {len(counts) - 1} more shards: {found}")
    remote = any(is_remote(index.shard) for index in indexes)
    default = default_slice_bytes(sum(sizes), remote)
    slice_bytes = default if slice_mib is None else max(1, int(slice_mib * 2**20))
    slices = Slices.cut(counts, sizes, slice_bytes)
    return PlannedSource(slices, weight, fingerprint(indexes), slices.unit(sum(sizes)))
