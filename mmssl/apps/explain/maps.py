"""Maps of an image that show the places matching a text: the methods by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.apps.explain.attention import attention_relevance
from mmssl.apps.explain.gradcam import gradcam, has_stages
from mmssl.apps.explain.occlusion import occlusion, rise
from mmssl.errors import UserError
from mmssl.models import DualEncoder, VisionTower

Method = Callable[[DualEncoder, Tensor, Tensor], Tensor]
"""Encoder, images uint8 [B, 3, S, S] and unit-length embeddings [B, D] of their texts -> maps [B, h, w]. Higher values
support the text more."""

METHODS: dict[str, Method] = {
    "rise": rise,
    "occlusion": occlusion,
    "gradcam": gradcam,
    "relevance": attention_relevance,
}
"""All methods by name; `methods_of` lists those that a tower supports."""
DEFAULT = "rise"
"""The default method: it supports every tower, and its deletion curves fall fastest by far (docs/report.md). It encodes
an image 256 times, occlusion 64 times, the others once."""


def methods_of(tower: VisionTower) -> list[str]:
    """Names of the methods that a tower supports."""
    unsupported = {
        "gradcam": tower.grid is not None or not has_stages(tower.trunk),
        "relevance": tower.grid is None,
    }
    return [name for name in METHODS if not unsupported.get(name)]


def image_maps(encoder: DualEncoder, images: Tensor, texts: Tensor, method: str | None = None) -> Tensor:
    """Maps of each image that show the places matching its text, float32 [B, h, w] on the method's own grid.

    Args:
        encoder: `mmssl.load(...).encoder`; it runs in evaluation mode.
        images: uint8 [B, 3, S, S], S = `encoder.vision.image_size`.
        texts: unit-length embeddings [B, D].
        method: a name in `METHODS`. Default: `DEFAULT`.

    Raises:
        UserError: no such method, or the tower does not support it.
    """
    name = method or DEFAULT
    if name not in METHODS:
        raise UserError(f"no method {name!r}; choose from {', '.join(METHODS)}")
    training = encoder.training
    encoder.eval()
    try:
        return METHODS[name](encoder, images, texts).detach().float()
    finally:
        encoder.train(training)


def heat(maps: Tensor, side: int) -> Tensor:
    """Positive values of maps [B, h, w], scaled to 0..1 per image and resized, [B, side, side]."""
    shown = F.interpolate(maps[:, None].clamp(min=0), size=(side, side), mode="bilinear", align_corners=False)[:, 0]
    return shown / shown.amax((1, 2), keepdim=True).clamp(min=1e-12)


def overlay(image: Tensor, values: Tensor) -> Tensor:
    """An image [3, S, S], pale and gray, under a map [h, w] from transparent to orange, uint8 [3, S, S]."""
    gray = image.float().mean(0, keepdim=True).expand(3, -1, -1)
    pale = 0.55 * gray + 0.45 * 255
    orange = torch.tensor([230.0, 80.0, 0.0])[:, None, None]
    strength = 0.8 * heat(values[None], image.shape[-1])
    return (pale * (1 - strength) + orange * strength).round().clamp(0, 255).to(torch.uint8)
