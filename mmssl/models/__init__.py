"""Towers, the dual encoder, heads of objectives, and LoRA. Libraries of towers are imported when one is built."""

from mmssl.models import heads, lora, tower_check
from mmssl.models.batch_norm import has_local_statistics, synchronize_batch_norm
from mmssl.models.dual_encoder import DualEncoder, ImageEncoder, build_dual_encoder
from mmssl.models.text import TextTower
from mmssl.models.text_open_clip import OpenClipText
from mmssl.models.vision import Encoded, VisionTower

__all__ = [
    "DualEncoder",
    "Encoded",
    "ImageEncoder",
    "OpenClipText",
    "TextTower",
    "VisionTower",
    "build_dual_encoder",
    "has_local_statistics",
    "heads",
    "lora",
    "synchronize_batch_norm",
    "tower_check",
]
