"""Sources: from patterns of shards to numbered samples."""

from mmssl.data.shards.causes import account_of_indexes
from mmssl.data.sources.catalog import Catalog, SampleLocation, index_source, make_index, plan_source
from mmssl.data.sources.patterns import expand

__all__ = [
    "Catalog",
    "SampleLocation",
    "account_of_indexes",
    "expand",
    "index_source",
    "make_index",
    "plan_source",
]
