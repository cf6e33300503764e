"""Dual encoders of open_clip and transformers. Libraries are imported on use."""

from mmssl.models.pretrained import foreign
from mmssl.models.pretrained.key_mapping import to_open_clip, to_transformers
from mmssl.models.pretrained.open_clip import PretrainedModel, read_open_clip
from mmssl.models.pretrained.transformers import is_transformers_folder, read_transformers

__all__ = [
    "PretrainedModel",
    "foreign",
    "is_transformers_folder",
    "read_open_clip",
    "read_transformers",
    "to_open_clip",
    "to_transformers",
]
