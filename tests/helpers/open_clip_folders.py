"""Small open_clip models with random weights, as folders that open_clip's `local-dir:` loads."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file

VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "patch_size": None}
TIMM = {"image_size": 64, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}
TIMM_HEAD = {"image_size": 64, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": None}
EVA_HEAD = {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = {**TEXT, "context_length": 16, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
BIDIRECTIONAL = {**TEXT, "no_causal_mask": True}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit-quickgelu": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "resnet": {"embed_dim": 24, "vision_cfg": RESNET, "text_cfg": TEXT},
    "timm": {"embed_dim": 24, "vision_cfg": TIMM, "text_cfg": TEXT, "custom_text": True},
    "timm-head": {"embed_dim": 24, "vision_cfg": TIMM_HEAD, "text_cfg": TEXT, "custom_text": True},
    "timm-head-as-wide": {"embed_dim": 512, "vision_cfg": TIMM_HEAD, "text_cfg": TEXT, "custom_text": True},
    "eva-head": {"embed_dim": 24, "vision_cfg": EVA_HEAD, "text_cfg": TEXT, "custom_text": True},
    "siglip-text": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": SIGLIP_TEXT, "custom_text": True},
    "bidirectional": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": BIDIRECTIONAL, "custom_text": True},
}
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.3, 0.2], "resize_mode": "squash", "interpolation": "bilinear"}
TEXTS = ["a photo of a cat", "Two DOGS, on a long beach!! it's 3 &amp; more", "crème brûlée 東京 🍎", "x" * 400, ""]


def write_open_clip(folder: Path, name: str) -> Any:
    """Write one of MODELS with random weights; returns open_clip's own model."""
    settings = json.loads(json.dumps(MODELS[name]))
    custom = settings.pop("custom_text", False)
    torch.manual_seed(0)
    model = (CustomTextCLIP if custom else CLIP)(**settings).eval()
    with torch.no_grad():  # a fresh batch norm or bias would hide a mistake
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.5, 0.1)
        model.logit_scale.fill_(3.0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    record = {
        "model_cfg": MODELS[name],
        "preprocess_cfg": {**PREPROCESSING, "size": settings["vision_cfg"]["image_size"]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    return open_clip.create_model(f"local-dir:{folder}").eval()
