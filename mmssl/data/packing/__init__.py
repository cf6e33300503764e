"""Writing shards from image folders, tables, Hugging Face datasets and other shards. `correct`: corrected shards."""

from mmssl.data.packing import correct
from mmssl.data.packing.folders import holds_pairs
from mmssl.data.packing.labelled import open_labelled
from mmssl.data.packing.packer import BAD, Encoding, Exclusion, Packed, pack
from mmssl.data.packing.records import Records
from mmssl.data.packing.shard_records import ShardRecords
from mmssl.data.packing.tables import open_records
from mmssl.data.shards.urls import table_suffix

__all__ = [
    "BAD",
    "Encoding",
    "Exclusion",
    "Packed",
    "Records",
    "ShardRecords",
    "correct",
    "holds_pairs",
    "open_labelled",
    "open_records",
    "pack",
    "table_suffix",
]
