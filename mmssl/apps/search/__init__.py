"""Stored embeddings of the images of shards, and search for the nearest ones to a text or an image."""

from mmssl.apps.search.embed import embed_shards, encode_query
from mmssl.apps.search.images import ShardImages, draw_hits, read_images
from mmssl.apps.search.index import Hit, Index
from mmssl.apps.search.nearest import Embeddings, Graph, exact_nearest
from mmssl.apps.search.other_stores import write_faiss, write_parquet

__all__ = [
    "Embeddings",
    "Graph",
    "Hit",
    "Index",
    "ShardImages",
    "draw_hits",
    "embed_shards",
    "encode_query",
    "exact_nearest",
    "read_images",
    "write_faiss",
    "write_parquet",
]
