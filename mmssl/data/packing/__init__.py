"""Writing shards from image folders, tables and Hugging Face datasets."""

from mmssl.data.packing.packer import BAD, Encoding, Format, Packed, pack
from mmssl.data.packing.tables import open_records

__all__ = ["BAD", "Encoding", "Format", "Packed", "open_records", "pack"]
