"""Image-text data: from shards to training batches, in a deterministic order that can be resumed."""

from mmssl.data.loader import LoaderConfig, LoaderCounters, Source, TrainLoader, resolve_sources
from mmssl.data.shards.account import Account
from mmssl.data.sources import expand
from mmssl.data.storage import iter_samples

__all__ = [
    "Account",
    "LoaderConfig",
    "LoaderCounters",
    "Source",
    "TrainLoader",
    "expand",
    "iter_samples",
    "resolve_sources",
]
