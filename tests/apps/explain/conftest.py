"""A dual encoder that looks at one patch only, and small trained-like ones of every kind of tower."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.config import ModelConfig, TextConfig, VisionConfig
from mmssl.models import DualEncoder, build_dual_encoder
from tests.helpers.models import TINY_TEXT

ROW, COLUMN = 2, 5
"""The only patch (of 8 x 8) that the toy looks at."""


class OnePatch(nn.Module):
    """Its vector is the mean colour of one patch of 4 px, of images of 32 px."""

    vision = SimpleNamespace(grid=None, places=None, token_width=None, width=3, image_size=32, trunk=nn.Identity())

    def encode_image(self, images: Tensor) -> Tensor:
        patch = images[:, :, 4 * ROW : 4 * ROW + 4, 4 * COLUMN : 4 * COLUMN + 4].float().mean((2, 3))
        return F.normalize(patch - 128, dim=-1)


@pytest.fixture
def one_patch() -> DualEncoder:
    return cast(DualEncoder, OnePatch())


def small_encoder(name: str, image_size: int = 64, dim: int = 16, **options: Any) -> DualEncoder:
    """A vision tower by name beside a tiny text tower, in evaluation mode."""
    torch.manual_seed(0)
    config = ModelConfig(
        vision=VisionConfig(name=name, image_size=image_size, options=options),
        text=TextConfig(config=TINY_TEXT, tokenizer="train", pooling="mean"),
        embed_dim=dim,
    )
    return build_dual_encoder(config, vocab_size=100, pad_id=0).eval()


RESNET: dict[str, Any] = {"name": "timm:resnet10t", "channels": [8, 16, 24, 32]}
VIT: dict[str, Any] = {"patch_size": 16, "depth": 2, "embed_dim": 32, "num_heads": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "resnet": RESNET,
    "efficientnet": {"name": "timm:efficientnet_lite0"},
    "swin": {
        "name": "timm:swin_tiny_patch4_window7_224",
        "image_size": 56,
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
    },
    "clip resnet": {"name": "open_clip:RN50", "layers": [1, 1, 1, 1], "width": 8},
    "class token": {"name": "timm:vit_tiny_patch16_224", **VIT},
    "mean of patches": {"name": "timm:vit_tiny_patch16_224", **VIT, "global_pool": "avg", "class_token": False},
    "attention pooling": {"name": "timm:vit_tiny_patch16_224", **VIT, "global_pool": "map", "class_token": False},
    "clip vit": {"name": "open_clip:ViT-B-32", "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
}


def images_and_texts(count: int, side: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return images, F.normalize(torch.randn(count, dim, generator=generator), dim=-1)
