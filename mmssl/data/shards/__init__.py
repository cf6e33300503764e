"""Shards: the members of a tar, its samples, and the index of their offsets."""

from mmssl.data.shards.causes import describe_problems
from mmssl.data.shards.index import FOLDER_FILE, Progress, index_shards
from mmssl.data.shards.members import IMAGES, SampleLimits
from mmssl.data.shards.samples import BadSample
from mmssl.data.shards.shard_index import ShardIndex, image_ranges, offsets_path
from mmssl.data.shards.urls import TABLES, is_remote

__all__ = [
    "FOLDER_FILE",
    "IMAGES",
    "TABLES",
    "BadSample",
    "Progress",
    "SampleLimits",
    "ShardIndex",
    "describe_problems",
    "image_ranges",
    "index_shards",
    "is_remote",
    "offsets_path",
]
