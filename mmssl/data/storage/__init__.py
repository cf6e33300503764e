"""Storage: the bytes of local and remote shards."""

from mmssl.data.storage.fetch import Fetcher, RetryPolicy
from mmssl.data.storage.files import Access, Files, LocalFiles
from mmssl.data.storage.remote_index import find_remote_indexes

__all__ = ["Access", "Fetcher", "Files", "LocalFiles", "RetryPolicy", "find_remote_indexes"]
