"""Sources: from patterns of shards to numbered samples."""

from mmssl.data.shards.causes import account_of_indexes, remedy_of
from mmssl.data.sources.catalog import index_source, make_index
from mmssl.data.sources.hold_out import hold_out
from mmssl.data.sources.patterns import expand, folder_shards, set_apart
from mmssl.data.sources.texts import iter_captions
from mmssl.data.sources.values import distinct_values, sample_keys

__all__ = [
    "account_of_indexes",
    "distinct_values",
    "expand",
    "folder_shards",
    "hold_out",
    "index_source",
    "iter_captions",
    "make_index",
    "remedy_of",
    "sample_keys",
    "set_apart",
]
