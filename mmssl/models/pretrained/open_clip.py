"""Whole models of other libraries, with their weights, as dual encoders."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPVisionCfg
from torch import Tensor, nn

from mmssl.config import ModelConfig, TextConfig, VisionConfig
from mmssl.errors import UserError
from mmssl.models.dual_encoder import DualEncoder
from mmssl.models.pretrained.weights import one_line
from mmssl.models.text import TextTower
from mmssl.models.text_open_clip import MODEL_TYPE, text_module
from mmssl.models.vision_factory import quiet, unknown_model, wrap_trunk


@dataclass(frozen=True)
class Pretrained:
    """A model that was read."""

    encoder: DualEncoder
    config: ModelConfig
    """Builds the same towers again."""
    tokenizer: str
    """What `load_tokenizer` takes."""
    drop_punctuation: bool
    """Its captions were lower-cased and stripped of punctuation."""
    notes: list[str]
    """What was taken over and what was left out, a line each."""


def read_open_clip(source: str) -> Pretrained:
    """open_clip's `MODEL`, `MODEL/TAG`, `MODEL/FILE` (weights) or `local-dir:FOLDER`.

    Raises:
        UserError: open_clip has no such model, or its weights cannot be had.
    """
    local = source.startswith("local-dir:")
    name, _, pretrained = (source, "", "") if local else source.partition("/")
    if not local and open_clip.get_model_config(name) is None:
        raise UserError(unknown_model("open_clip", name, open_clip.list_models()))
    try:
        with quiet(True):
            settings = open_clip.get_model_config(name)
            model = open_clip.create_model(name, pretrained=pretrained or None, pretrained_text=False)
    except (RuntimeError, TypeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"open_clip could not make {source!r}: {one_line(error)}") from error
    words = settings["text_cfg"].get("tokenizer_kwargs") or {}
    if words.get("strip_sep_token", False):
        raise UserError(f"open_clip's {source} reads captions without their end token, which cannot be done here")
    origin = "a folder of open_clip" if local else f"open_clip's {name}/{Path(pretrained).name}"
    notes = [f"{len(model.state_dict())} weights of {origin}"]
    if settings["text_cfg"].get("hf_model_name") is not None:
        text, projection = _hugging_face_text(model.text, settings["text_cfg"], source)
        tokenizer = name.removeprefix("local-dir:") if local else settings["text_cfg"]["hf_tokenizer_name"]
    else:
        text, projection = _own_text(model, settings)
        tokenizer = settings["text_cfg"].get("hf_tokenizer_name") or "clip"
        if local and tokenizer != "clip":
            tokenizer = name.removeprefix("local-dir:")
    if not local and not pretrained:
        notes = [f"random weights for open_clip's {source}; give {source}/TAG for trained ones"]
    if getattr(model, "logit_bias", None) is not None:
        notes.append("left out: logit_bias, which changes no order")
    if hasattr(model, "text_decoder"):
        notes.append("left out: the text decoder, which only captions")
    built = None if local else name
    return _assembled(model, settings, text, projection, tokenizer, notes, built)


def _own_text(model: Any, settings: dict[str, Any]) -> tuple[TextTower, Tensor | None]:
    kept = {key: settings[key] for key in ("quick_gelu", "custom_text") if key in settings}
    text_settings = {**settings["text_cfg"], **kept}
    encoder, projection = text_module(model, text_settings, settings["embed_dim"])
    return TextTower(encoder, "pooler" if encoder.projects else "eos"), projection


_POOLING = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "cls", "cls_pooler": "pooler"}


def _hugging_face_text(text: Any, settings: dict[str, Any], source: str) -> tuple[TextTower, Tensor | None]:
    pooling = _POOLING.get(settings.get("hf_pooler_type", "mean_pooler"))
    if pooling is None or not isinstance(text.proj, nn.Linear):
        raise UserError(
            f"{source}: its text tower is pooled by {settings.get('hf_pooler_type')} and projected by "
            f"{type(text.proj).__name__}; mean, cls and a linear projection can be taken over"
        )
    return TextTower(text.transformer, pooling), text.proj.weight.detach()


def _assembled(
    model: Any,
    settings: dict[str, Any],
    text: TextTower,
    projection: Tensor | None,
    tokenizer: str,
    notes: list[str],
    name: str | None,
) -> Pretrained:
    """The dual encoder of an open_clip model and its taken-over text tower."""
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    fit, interpolation = preprocessing["resize_mode"], preprocessing["interpolation"]
    if fit not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear"):
        raise UserError(f"images fitted by {fit!r} and resized by {interpolation!r} cannot be made here")
    vision, image_projection = wrap_trunk(model.visual, preprocessing["mean"], preprocessing["std"])
    dim = settings["embed_dim"]
    scale = float(model.logit_scale.detach().exp())
    config = ModelConfig(
        vision=VisionConfig(
            **_vision_config(settings, name),
            image_size=vision.image_size,
            mean=vision.statistics[0],
            std=vision.statistics[1],
            fit=fit,
            interpolation=interpolation,
        ),
        text=text_config(text, tokenizer, settings["text_cfg"].get("context_length", 77)),
        embed_dim=dim,
        max_logit_scale=max(100.0, math.ceil(scale)),
    )
    encoder = DualEncoder(
        vision,
        text,
        linear(image_projection),
        linear(projection),
        dim,
        config.init_temperature,
        config.max_logit_scale,
    )
    with torch.no_grad():
        encoder.log_logit_scale.copy_(model.logit_scale.reshape(()))
    words = settings["text_cfg"].get("tokenizer_kwargs") or {}
    return Pretrained(encoder, config, tokenizer, words.get("clean") == "canonicalize", notes)


def _vision_config(settings: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Name and options that build the visual tower again; for a configuration of one's own, from a built-in one."""
    if name is not None:
        return {"name": f"open_clip:{name}"}
    base = "ViT-B-32-quickgelu" if settings.get("quick_gelu", False) else "ViT-B-32"
    defaults = {field.name: field.default for field in fields(CLIPVisionCfg)}
    defaults |= open_clip.get_model_config(base)["vision_cfg"]
    own = asdict(CLIPVisionCfg(**settings["vision_cfg"]))
    options = {k: v for k, v in own.items() if v != defaults[k] and k != "timm_model_pretrained"}
    return {"name": f"open_clip:{base}", "options": options}


def text_config(text: TextTower, tokenizer: str, max_tokens: int) -> TextConfig:
    """The configuration that builds a tower of this architecture again."""
    settings = {**text.encoder.config.to_diff_dict(), "model_type": text.encoder.config.model_type}
    for key in ("transformers_version", "architectures", "_name_or_path", "dtype"):
        settings.pop(key, None)
    if settings["model_type"] != MODEL_TYPE:
        settings["vocab_size"] = text.encoder.config.vocab_size
    pooling: Any = text.pooling
    return TextConfig(config=settings, tokenizer=tokenizer, pooling=pooling, max_tokens=max_tokens)


def linear(weight: Tensor | None) -> nn.Module:
    """A projection by these weights [out, in]; none where the tower projects by itself."""
    if weight is None:
        return nn.Identity()
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        projection.weight.copy_(weight)
    return projection
