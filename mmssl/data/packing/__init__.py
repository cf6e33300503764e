"""Writing shards from image folders, tables and Hugging Face datasets."""

from mmssl.data.packing.packer import BAD, Encoding, Format, Packed, pack
from mmssl.data.packing.table_records import TableOptions
from mmssl.data.packing.tables import open_records
from mmssl.data.shards.urls import table_suffix

__all__ = ["BAD", "Encoding", "Format", "Packed", "TableOptions", "open_records", "pack", "table_suffix"]
