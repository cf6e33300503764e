"""Sources: from patterns of shards to numbered samples."""

from mmssl.data.sources.catalog import Catalog, index_source, make_index, plan_source
from mmssl.data.sources.patterns import expand

__all__ = ["Catalog", "expand", "index_source", "make_index", "plan_source"]
