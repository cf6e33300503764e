"""Images of shards as stored vectors, and the nearest of them to a text or an image."""

from mmssl.apps.search.embed import embed_shards
from mmssl.apps.search.images import ShardImages
from mmssl.apps.search.index import Hit, Index
from mmssl.apps.search.nearest import exact_nearest
from mmssl.apps.search.query import encode_query

__all__ = ["Hit", "Index", "ShardImages", "embed_shards", "encode_query", "exact_nearest"]
