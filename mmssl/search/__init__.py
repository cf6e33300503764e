"""Pictures of shards as stored vectors, and the nearest of them to a text or a picture."""

from mmssl.search.embed import embed_shards
from mmssl.search.index import Hit, Index
from mmssl.search.nearest import exact_nearest
from mmssl.search.originals import Originals

__all__ = ["Hit", "Index", "Originals", "embed_shards", "exact_nearest"]
