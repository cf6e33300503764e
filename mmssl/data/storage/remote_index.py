"""The index of remote shards, stored beside them."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmssl.data.shards import FOLDER_FILE, Progress, SampleLimits, ShardIndex
from mmssl.data.shards.index import folder_json, index_from_json, index_to_json
from mmssl.data.shards.shard_index import Offsets, checksum
from mmssl.data.shards.urls import beside, file_name, in_folder
from mmssl.data.storage.fetch import Fetcher
from mmssl.data.storage.http import RemoteFileMissingError
from mmssl.data.storage.sequential import index_forward
from mmssl.errors import UserError

_THREADS = 16


def find_remote_indexes(shards: Sequence[str], limits: SampleLimits, fetcher: Fetcher) -> list[ShardIndex | None]:
    """The index of each remote shard: the entry in the folder's file, else the shard's own offsets, else None."""
    folders = sorted({in_folder(shard, FOLDER_FILE) for shard in shards})
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mmssl-index") as pool:
        kept = dict(zip(folders, pool.map(lambda folder: _read_folder(folder, fetcher), folders), strict=True))
        return list(pool.map(lambda shard: _find(shard, kept[in_folder(shard, FOLDER_FILE)], limits, fetcher), shards))


def index_remote_shards(
    shards: Sequence[str], limits: SampleLimits, fetcher: Fetcher, progress: Progress | None = None
) -> list[ShardIndex]:
    """Read remote shards from beginning to end and write their index beside them.

    Raises:
        UserError: a shard is out of reach, or its file system cannot be written.
    """
    made: list[ShardIndex] = []
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mmssl-index") as pool:
        for index in pool.map(lambda shard: index_forward(shard, fetcher, limits), shards):
            assert index.offsets is not None
            fetcher.write(beside(index.shard, ".idx"), index.offsets.astype("<u8").tobytes())
            made.append(index)
            if progress is not None:
                progress(len(made), len(shards))
    for folder in sorted({in_folder(shard, FOLDER_FILE) for shard in shards}):
        entries = _read_folder(folder, fetcher)
        entries.update(
            (file_name(i.shard), index_to_json(i)) for i in made if in_folder(i.shard, FOLDER_FILE) == folder
        )
        fetcher.write(folder, folder_json(entries))
    return made


def remote_offsets(index: ShardIndex, fetcher: Fetcher) -> Offsets:
    """The offsets of a remote shard."""
    if index.offsets is not None:
        return index.offsets
    return _parse_offsets(f"{index.shard}.idx", b"".join(fetcher.stream(beside(index.shard, ".idx"))))


def _read_folder(url: str, fetcher: Fetcher) -> dict[str, Any]:
    try:
        tree = json.loads(b"".join(fetcher.stream(url)))
        return dict(tree["shards"])
    except RemoteFileMissingError:
        return {}
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{url} is damaged; index the shards again") from None


def _find(shard: str, entries: dict[str, Any], limits: SampleLimits, fetcher: Fetcher) -> ShardIndex | None:
    entry = entries.get(file_name(shard))
    try:
        if entry is not None:
            return index_from_json(shard, entry)
        offsets = _parse_offsets(shard, b"".join(fetcher.stream(beside(shard, ".idx"))))
    except RemoteFileMissingError:
        return None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError):
        raise UserError(f"the index of {shard} is damaged; index it again") from None
    return ShardIndex(
        shard=shard,
        bytes=fetcher.size(shard),
        mtime_ns=0,
        groups=len(offsets) - 1,
        left_out=(),
        problems=(),
        checksum=checksum(offsets),
        max_member_bytes=limits.max_member_bytes,
        offsets=offsets,
    )


def _parse_offsets(name: str, content: bytes) -> Offsets:
    if len(content) % 8 or len(content) < 8:
        raise UserError(f"{name} has {len(content)} bytes, not a multiple of 8; index the shards again")
    offsets: Offsets = np.frombuffer(content, dtype="<u8")
    if (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise UserError(f"{name} does not increase; index the shards again")
    return offsets
