"""Whole dual encoders of transformers, with their weights: CLIPModel, SiglipModel and VisionTextDualEncoderModel."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel

from mmssl.config import ModelConfig, VisionConfig
from mmssl.errors import UserError
from mmssl.models.dual_encoder import DualEncoder
from mmssl.models.pretrained.key_mapping import to_open_clip
from mmssl.models.pretrained.open_clip import Pretrained, linear, text_config
from mmssl.models.pretrained.siglip import siglip_text, siglip_vision, to_timm
from mmssl.models.pretrained.weights import one_line
from mmssl.models.text import TextTower
from mmssl.models.vision import VisionTower
from mmssl.models.vision_factory import build_vision

_KINDS = ("clip", "siglip", "vision-text-dual-encoder")
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


def is_transformers_folder(folder: Path) -> bool:
    """Whether it holds a dual encoder of transformers."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def read_transformers(name: str) -> Pretrained:
    """A folder or a hub name.

    Raises:
        UserError: it cannot be read, or is no dual encoder whose towers can be taken over.
    """
    try:
        model, report = AutoModel.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"transformers cannot read {name!r}: {one_line(error)}") from error
    kind = model.config.model_type
    if kind not in _KINDS:
        raise UserError(f"{name} is a {kind!r} of transformers; of its dual encoders, {' and '.join(_KINDS)} are known")
    if report["missing_keys"]:
        raise UserError(
            f"{name} lacks {len(report['missing_keys'])} weights, {sorted(report['missing_keys'])[0]} first"
        )
    encoder, config = _siglip(model, name) if kind == "siglip" else _clip(model, name)
    with torch.no_grad():
        encoder.log_logit_scale.copy_(model.logit_scale.reshape(()))
    notes = [f"{len(model.state_dict())} weights of a {kind} of transformers"]
    notes += [f"left out: {key}" for key in sorted(report["unexpected_keys"])]
    notes += ["left out: logit_bias, which changes no order"] if kind == "siglip" else []
    return Pretrained(encoder, config, name, False, notes)


def _clip(model: Any, name: str) -> tuple[DualEncoder, ModelConfig]:
    """CLIP's vision transformer with any text tower."""
    vision, dim = _vision_config(model.vision_model.config, name), int(model.visual_projection.out_features)
    tower, _ = build_vision(vision, dim)
    _load(tower, to_open_clip, model.vision_model, name)
    # CLIP's text model pools at the end token, which the mask shows too; others pool by a module of their own.
    text = TextTower(model.text_model, "eos" if model.text_model.config.model_type == "clip_text_model" else "pooler")
    limit = int(getattr(model.text_model.config, "max_position_embeddings", 77))
    config = ModelConfig(vision=vision, text=text_config(text, name, min(limit, 77)), embed_dim=dim)
    projections = (linear(model.visual_projection.weight.detach()), linear(model.text_projection.weight.detach()))
    return DualEncoder(tower, text, *projections, dim, config.init_temperature, config.max_logit_scale), config


def _siglip(model: Any, name: str) -> tuple[DualEncoder, ModelConfig]:
    """SigLIP's towers, which pool and project by themselves."""
    settings = model.text_model.config
    vision = siglip_vision(model.vision_model.config, _preprocessing(name))
    dim = int(settings.projection_size)
    tower, _ = build_vision(vision, dim)
    _load(tower, to_timm, model.vision_model, name)
    text = siglip_text(model.text_model, int(settings.pad_token_id))
    config = ModelConfig(
        vision=vision,
        text=text_config(text, name, int(settings.max_position_embeddings)),
        embed_dim=dim,
        max_logit_scale=max(100.0, math.ceil(float(model.logit_scale.detach().exp()))),
    )
    projections = (linear(torch.eye(dim)), linear(None))
    return DualEncoder(tower, text, *projections, dim, config.init_temperature, config.max_logit_scale), config


def _vision_config(vision: Any, name: str) -> VisionConfig:
    """The open_clip tower of CLIP's form that equals transformers' one."""
    if vision.model_type != "clip_vision_model" or vision.hidden_act not in ("gelu", "quick_gelu"):
        raise UserError(f"{name}: its vision tower is a {vision.model_type!r}; only CLIP's ViT can be taken over")
    quick = vision.hidden_act == "quick_gelu"
    options: dict[str, Any] = {
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "patch_size": vision.patch_size,
    }
    if vision.layer_norm_eps != 1e-5:
        options["norm_kwargs"] = {"eps": vision.layer_norm_eps}
    return VisionConfig(
        name=f"open_clip:ViT-B-32{'-quickgelu' if quick else ''}",
        options=options,
        image_size=vision.image_size,
        **_preprocessing(name),
    )


def _preprocessing(name: str) -> dict[str, Any]:
    """Colours and size as the folder's image processor has them; CLIP's where there is none."""
    try:
        processor = AutoImageProcessor.from_pretrained(name).to_dict()
    except OSError:
        return {}
    interpolation = _RESAMPLE.get(int(processor.get("resample", 3)))
    if interpolation is None:
        raise UserError(f"{name}: images resized by Pillow's filter {processor['resample']} cannot be made here")
    return {
        "mean": tuple(processor["image_mean"]),
        "std": tuple(processor["image_std"]),
        "fit": "shortest" if "shortest_edge" in (processor.get("size") or {}) else "squash",
        "interpolation": interpolation,
    }


def _load(tower: VisionTower, rename: Callable[[dict[str, Any]], dict[str, Any]], theirs: Any, name: str) -> None:
    try:
        tower.trunk.load_state_dict(rename(theirs.state_dict()))
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{name}: its vision tower is of no known form: {one_line(error)}") from error
