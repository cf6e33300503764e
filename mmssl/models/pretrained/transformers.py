"""Dual encoders of transformers, with their weights: CLIPModel, SiglipModel and VisionTextDualEncoderModel.

SigLIP's vision tower becomes timm's, its text tower becomes open_clip's, which also reads padding.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmssl.config import ModelConfig, VisionConfig
from mmssl.errors import UserError, one_line
from mmssl.models.dual_encoder import DualEncoder
from mmssl.models.pretrained.key_mapping import to_open_clip, to_timm
from mmssl.models.pretrained.open_clip import PretrainedModel, linear
from mmssl.models.text import TextTower
from mmssl.models.text_factory import positions
from mmssl.models.text_open_clip import build_open_clip_text
from mmssl.models.vision import VisionTower
from mmssl.models.vision_factory import build_vision

_KINDS = ("clip", "siglip", "vision-text-dual-encoder")
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""Pillow's number of a filter -> its name."""
_ACTIVATIONS = {"gelu": ("gelu", None), "gelu_pytorch_tanh": ("gelu_tanh", {"approximate": "tanh"})}
"""transformers' name -> timm's name and open_clip's GELU arguments."""


def is_transformers_folder(folder: Path) -> bool:
    """True if the folder has a model of transformers."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def read_transformers(name: str) -> PretrainedModel:
    """Read a dual encoder from a folder or by its hub name.

    Raises:
        UserError: it cannot be read, or its kind is not supported.
    """
    from transformers import AutoModel

    try:
        # The stored type may be a half format, which does not multiply with the projections.
        model, report = AutoModel.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"transformers cannot read {name!r}: {one_line(error)}") from error
    kind = model.config.model_type
    if kind not in _KINDS:
        raise UserError(f"{name} is a {kind!r} of transformers; supported kinds are {', '.join(_KINDS)}")
    if report["missing_keys"]:
        raise UserError(
            f"{name} lacks {len(report['missing_keys'])} weights, for example {sorted(report['missing_keys'])[0]}"
        )
    encoder, config = _siglip(model, name) if kind == "siglip" else _clip(model, name)
    with torch.no_grad():
        encoder.log_logit_scale.copy_(model.logit_scale.reshape(()))
    notes = [f"{len(model.state_dict())} weights of a {kind} of transformers"]
    notes += [f"left out: {key}" for key in sorted(report["unexpected_keys"])]
    notes += ["left out: logit_bias, which does not change rankings"] if kind == "siglip" else []
    return PretrainedModel(encoder, config, name, False, notes)


def _clip(model: Any, name: str) -> tuple[DualEncoder, ModelConfig]:
    """CLIP's vision transformer with any text tower."""
    vision, dim = _vision_config(model.vision_model.config, name), int(model.visual_projection.out_features)
    tower, _ = build_vision(vision, dim)
    _load(tower, to_open_clip, model.vision_model, name)
    # CLIP's text model pools at the end token, which the mask shows as well; others have their own pooling module.
    pooling = "eos" if model.text_model.config.model_type == "clip_text_model" else "pooler"
    longest = min(positions(model.text_model) or 77, 77)
    pad_id = getattr(model.text_model.config, "pad_token_id", None) or 0
    text = TextTower(model.text_model, pooling, max_tokens=longest, pad_id=pad_id)
    config = ModelConfig(vision=vision, text=text.to_config(name, longest), embed_dim=dim)
    projections = (linear(model.visual_projection.weight.detach()), linear(model.text_projection.weight.detach()))
    return DualEncoder(tower, text, *projections, dim, config.init_temperature, config.max_logit_scale), config


def _siglip(model: Any, name: str) -> tuple[DualEncoder, ModelConfig]:
    """SigLIP's towers, which pool and project themselves."""
    settings = model.text_model.config
    vision = _siglip_vision(model.vision_model.config, _preprocessing(name))
    dim = int(settings.projection_size)
    tower, _ = build_vision(vision, dim)
    _load(tower, to_timm, model.vision_model, name)
    text = _siglip_text(model.text_model, int(settings.pad_token_id))
    config = ModelConfig(
        vision=vision,
        text=text.to_config(name, int(settings.max_position_embeddings)),
        embed_dim=dim,
        max_logit_scale=max(100.0, math.ceil(float(model.logit_scale.detach().exp()))),
    )
    projections = (linear(torch.eye(dim)), linear(None))
    return DualEncoder(tower, text, *projections, dim, config.init_temperature, config.max_logit_scale), config


def _vision_config(vision: Any, name: str) -> VisionConfig:
    """The open_clip tower equivalent to a CLIP vision tower of transformers."""
    if vision.model_type != "clip_vision_model" or vision.hidden_act not in ("gelu", "quick_gelu"):
        raise UserError(f"{name}: its vision tower is a {vision.model_type!r}; only CLIP's ViT is supported")
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
    """Colour statistics and resizing of the folder's image processor; empty, for CLIP's, without one."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name).to_dict()
    except OSError:
        return {}
    interpolation = _RESAMPLE.get(int(processor.get("resample", 3)))
    if interpolation is None:
        raise UserError(f"{name}: Pillow's filter {processor['resample']} is not supported; use bilinear or bicubic")
    return {
        "mean": tuple(processor["image_mean"]),
        "std": tuple(processor["image_std"]),
        "fit": "shortest" if "shortest_edge" in (processor.get("size") or {}) else "squash",
        "interpolation": interpolation,
    }


def _siglip_vision(vision: Any, preprocessing: Mapping[str, Any]) -> VisionConfig:
    """timm's tower equivalent to a `SiglipVisionConfig` of transformers.

    Raises:
        UserError: its activation is unknown, or it does not pool.
    """
    if vision.hidden_act not in _ACTIVATIONS or not getattr(vision, "vision_use_head", True):
        raise UserError(f"a SigLIP vision tower with {vision.hidden_act} or without pooling is not supported")
    options = {
        "embed_dim": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "patch_size": vision.patch_size,
        "act_layer": _ACTIVATIONS[vision.hidden_act][0],
    }
    name, side = "timm:vit_base_patch16_siglip_224", vision.image_size
    return VisionConfig(name=name, options=options, image_size=side, **preprocessing)


def _siglip_text(text: Any, pad_id: int) -> TextTower:
    """transformers' SiglipTextModel as open_clip's transformer, which pools its last token and projects with a bias.

    Raises:
        UserError: its activation is unknown.
    """
    config = text.config
    if config.hidden_act not in _ACTIVATIONS:
        raise UserError(f"a SigLIP text tower with {config.hidden_act} is not supported")
    settings: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_bias": True,
        "custom_text": True,
        "act_kwargs": _ACTIVATIONS[config.hidden_act][1],
        "norm_kwargs": {"eps": config.layer_norm_eps},
        "output_dim": config.projection_size,
        "hf_tokenizer_name": "its own",
        "pad_id": pad_id,
    }
    encoder = build_open_clip_text(settings)
    state = text.state_dict()
    tower = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    head = {f"text_projection.{kind}": state[f"head.{kind}"] for kind in ("weight", "bias")}
    encoder.model.load_state_dict({**to_open_clip(tower), **head})
    return TextTower(encoder, "pooler")


def _load(tower: VisionTower, rename: Callable[[dict[str, Any]], dict[str, Any]], theirs: Any, name: str) -> None:
    try:
        tower.trunk.load_state_dict(rename(theirs.state_dict()))
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{name}: the form of its vision tower is unknown: {one_line(error)}") from error
