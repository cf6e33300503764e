"""Writing shards from image folders, tables, Hugging Face datasets and other shards."""

from mmssl.data.packing.folders import holds_pairs
from mmssl.data.packing.packer import BAD, Encoding, Format, Packed, pack
from mmssl.data.packing.shard_records import ShardRecords
from mmssl.data.packing.tables import open_records

__all__ = ["BAD", "Encoding", "Format", "Packed", "ShardRecords", "holds_pairs", "open_records", "pack"]
