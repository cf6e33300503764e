"""Sources: from patterns of shards to numbered samples."""

from mmssl.data.shards.causes import account_of_indexes, remedy_of
from mmssl.data.sources.catalog import Catalog, SampleLocation, index_source, make_index, plan_source
from mmssl.data.sources.patterns import expand, folder_shards, set_apart
from mmssl.data.sources.texts import iter_captions

__all__ = [
    "Catalog",
    "SampleLocation",
    "account_of_indexes",
    "expand",
    "folder_shards",
    "index_source",
    "iter_captions",
    "make_index",
    "plan_source",
    "remedy_of",
    "set_apart",
]
