"""The images of an index, read from their shards one at a time."""

import os
from functools import lru_cache
from pathlib import Path

from mmssl.apps.search.index import Index
from mmssl.data.shards import image_ranges, is_remote

SHARDS = 32
"""Shards whose tables of contents stay in memory."""


class ShardImages:
    """Encoded images by row. The first image of a shard costs a walk over its headers, the others a read."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._places = lru_cache(SHARDS)(image_ranges)

    def read(self, row: int) -> bytes | None:
        """The encoded image of a row; None where its shard is no local file, is gone, or no longer has it."""
        hit = self._index.hits([row], [0.0])[0]
        if is_remote(hit.shard):
            return None
        try:
            with Path(hit.shard).open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                place = self._places(hit.shard, status.st_mtime_ns, status.st_size).get(hit.key)
                if place is None:
                    return None
                start, size = place
                content = os.pread(file.fileno(), size, start)
        except OSError:
            return None
        return content if len(content) == size else None
