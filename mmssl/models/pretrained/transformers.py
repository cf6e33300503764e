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
from mmssl.models.positions import positions
from mmssl.models.pretrained.key_mapping import to_open_clip, to_timm
from mmssl.models.pretrained.open_clip import PretrainedModel, linear
from mmssl.models.text import TextTower
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
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def read_transformers(name: str) -> PretrainedModel:
    """Read a dual encoder from a folder or by its hub name.

    Raises:
        UserError: it cannot be read, or its kind is not supported.
    """
    from transformers import AutoModel

    try:
        # The stored type may be a half format, which does not multiply with the projections.
        model, report = AutoModel.from_pretrained(
            name, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # transformers and pickle raise many kinds on damaged or unsafe files
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
    vision = _siglip_vision(model.vision_model.config, _preprocessing(name, int(model.vision_model.config.image_size)))
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
        **_preprocessing(name, vision.image_size),
    )


def _preprocessing(name: str, side: int) -> dict[str, Any]:
    """Colours and resizing of the folder's image processor for images of `side` pixels; empty, for CLIP's, without one.

    Raises:
        UserError: the processor does something that evaluation here does not do.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False).to_dict()
    except OSError:
        return {}
    return {**_colours(processor), **_resizing(processor, name, side)}


def _colours(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation on a scale of 0 to 1 with which (x - mean) / std is what the processor computes."""
    # The processor's value of white.
    white = 255 * float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 255.0
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    else:
        mean, std = processor["image_mean"], processor["image_std"]
    return {"mean": tuple(value / white for value in mean), "std": tuple(value / white for value in std)}


def _resizing(processor: Mapping[str, Any], name: str, side: int) -> dict[str, Any]:
    """Fit and interpolation of the processor.

    Raises:
        UserError: it resizes or crops to another size, does not do it, or uses another filter.
    """
    interpolation = _RESAMPLE.get(int(processor.get("resample", 3)))
    if interpolation is None:
        raise UserError(f"{name}: Pillow's filter {processor['resample']} is not supported; use bilinear or bicubic")
    size, crop = _sides(processor.get("size")), _sides(processor.get("crop_size"))
    crops = bool(processor.get("do_center_crop", False))
    shortest = set(size) == {"shortest_edge"}
    wanted = {key: value for key, value in size.items() if value != side}
    problems = [
        ("does not resize images (do_resize)", not processor.get("do_resize", True)),
        (f"resizes to {wanted} for a model of {side} pixels", bool(wanted)),
        (f"crops to {crop} for a model of {side} pixels", crops and any(value != side for value in crop.values())),
        ("leaves images that are not square (do_center_crop)", shortest and not crops),
        ("pads images (do_pad)", bool(processor.get("do_pad", False))),
    ]
    for problem, found in problems:
        if found:
            raise UserError(f"{name}: its image processor {problem}, which is not supported; edit its configuration")
    return {"fit": "shortest" if shortest else "squash", "interpolation": interpolation}


def _sides(size: Any) -> dict[str, int]:
    """The sides that a processor's `size` or `crop_size` names, in any of its forms."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {key: int(value) for key, value in dict(size).items() if value is not None}


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
