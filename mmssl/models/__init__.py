"""Towers, the dual encoder, heads of objectives, and LoRA. Libraries of towers are imported when one is built."""

from mmssl.models import batch_norm, heads, lora, tower_check
from mmssl.models.dual_encoder import DualEncoder, ImageEncoder, build_dual_encoder, build_tower
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
    "batch_norm",
    "build_dual_encoder",
    "build_tower",
    "heads",
    "lora",
    "tower_check",
]
