"""Pictures of shards as stored vectors, and the nearest of them to a text or a picture."""

from mmssl.search.embed import embed_shards
from mmssl.search.index import Hit, Index
from mmssl.search.nearest import exact_nearest
from mmssl.search.originals import Originals
from mmssl.search.query import encode_query

__all__ = ["Hit", "Index", "Originals", "embed_shards", "encode_query", "exact_nearest"]
