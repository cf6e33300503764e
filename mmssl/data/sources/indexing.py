"""Sources of shards: their index and their slices."""

from collections.abc import Sequence

from mmssl.data.order.epoch import Slices, default_slice_bytes
from mmssl.data.order.plan import PlannedSource
from mmssl.data.shards.index import Progress, fingerprint, index_shards, report
from mmssl.data.shards.samples import SampleLimits
from mmssl.data.shards.shard_index import ShardIndex
from mmssl.data.sources.patterns import is_remote
from mmssl.data.storage.fetch import Fetcher
from mmssl.data.storage.files import Access
from mmssl.data.storage.remote_index import find_remote_indexes, index_remote_shards
from mmssl.errors import UserError


def index_source(
    shards: Sequence[str], limits: SampleLimits, access: Access, progress: Progress | None = None
) -> list[ShardIndex | None]:
    """The index of each shard; None for a remote one that has none beside it."""
    local = [shard for shard in shards if not is_remote(shard)]
    remote = [shard for shard in shards if is_remote(shard) and not shard.startswith("pipe:")]
    found: dict[str, ShardIndex | None] = {i.shard: i for i in index_shards(local, limits, progress=progress)}
    indexes = find_remote_indexes(remote, limits, Fetcher(access.retry_policy))
    found.update(zip(remote, indexes, strict=True))
    return [found.get(shard) for shard in shards]


def make_index(
    shards: Sequence[str], limits: SampleLimits, access: Access, processes: int = 0, progress: Progress | None = None
) -> list[ShardIndex]:
    """Index local and remote shards anew where that is needed, and keep the index beside them.

    Raises:
        UserError: a shard is out of reach or is a command, or a remote file system cannot be written.
    """
    commands = [shard for shard in shards if shard.startswith("pipe:")]
    if commands:
        raise UserError(f"{commands[0]!r} is a command, which has no index; name files")
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
        found = report(indexes) or "they are empty"
        raise UserError(f"no usable sample in {indexes[0].shard} and its {len(counts) - 1} fellows: {found}")
    remote = any(is_remote(index.shard) for index in indexes)
    default = default_slice_bytes(sum(sizes), remote)
    slice_bytes = default if slice_mib is None else max(1, int(slice_mib * 2**20))
    slices = Slices.cut(counts, sizes, slice_bytes)
    return PlannedSource(slices, weight, fingerprint(indexes), slices.unit(sum(sizes)))
