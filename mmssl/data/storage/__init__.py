"""Storage: the bytes of local and remote shards."""

from mmssl.data.storage.blocks import Span
from mmssl.data.storage.fetch import Fetcher, RetryPolicy
from mmssl.data.storage.files import Access, Files, LocalFiles
from mmssl.data.storage.filesystem import list_fsspec
from mmssl.data.storage.remote_index import find_remote_indexes, index_remote_shards, remote_offsets
from mmssl.data.storage.sequential import iter_samples, read_shard

__all__ = [
    "Access",
    "Fetcher",
    "Files",
    "LocalFiles",
    "RetryPolicy",
    "Span",
    "find_remote_indexes",
    "index_remote_shards",
    "iter_samples",
    "list_fsspec",
    "read_shard",
    "remote_offsets",
]
