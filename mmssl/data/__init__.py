"""Image-text data: from shards to training batches, in a deterministic order that can be resumed."""

from mmssl.data.loader import ChooseBatching, LoaderConfig, LoaderCounters, Source, TrainLoader, resolve_sources
from mmssl.data.shards.account import Account
from mmssl.data.shards.causes import account_of
from mmssl.data.shards.members import USUAL_MEMBERS, MemberNames
from mmssl.data.sources import expand
from mmssl.data.storage import iter_samples

__all__ = [
    "USUAL_MEMBERS",
    "Account",
    "ChooseBatching",
    "LoaderConfig",
    "LoaderCounters",
    "MemberNames",
    "Source",
    "TrainLoader",
    "account_of",
    "expand",
    "iter_samples",
    "resolve_sources",
]
