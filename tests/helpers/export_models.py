"""A small model of one's own."""

from collections.abc import Mapping
from typing import Any

import torch

import mmssl
from mmssl.config import ModelConfig, TextConfig, VisionConfig
from mmssl.data.transforms import train_tokenizer
from mmssl.inference import probabilities
from mmssl.models import build_dual_encoder
from tests.helpers.models import TINY_TEXT


def own(
    pooling: str = "mean",
    projection: str = "linear",
    vision: str = "timm:resnet10t",
    text: Mapping[str, Any] = TINY_TEXT,
) -> mmssl.Model:
    """A timm ResNet and a BERT with a learnt tokenizer, as the quickstart's."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red square", "a green square", "blue and white"], 100, 20)
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2} if "vit" in vision else {}
    options = {"width": 32, "layers": 1, "head_width": 16, "patch_size": 16} if "open_clip" in vision else options
    tree: dict[str, Any] = {
        "vision": VisionConfig(name=vision, image_size=32, options=options),
        "text": TextConfig(config=dict(text), tokenizer="train", pooling=pooling, max_tokens=20),
        "embed_dim": 16,
        "projection": projection,
    }
    config = ModelConfig(**tree)
    encoder = build_dual_encoder(config, tokenizer.vocab_size, tokenizer.pad_id).eval()
    return mmssl.Model(encoder, tokenizer, config)


def some_calibration() -> probabilities.Calibration:
    """Numbers of a calibration, which nothing was fitted for."""
    return probabilities.Calibration(
        data="pairs",
        samples=100,
        label_scale=20,
        label_curve=1.5,
        match_scale=30,
        match_bias=-3,
        known_scale=10,
        known_bias=-1,
        coverage=0.9,
        match_threshold=0.1,
        label_threshold=0.3,
        metrics={},
    )
