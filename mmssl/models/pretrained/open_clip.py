"""Models of open_clip, with their weights, as dual encoders."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.config import ModelConfig, VisionConfig
from mmssl.errors import UserError, one_line
from mmssl.models.dual_encoder import DualEncoder
from mmssl.models.text import TextTower
from mmssl.models.text_open_clip import text_module
from mmssl.models.vision_factory import check_quick_gelu, quiet, unknown_model, wrap_trunk


@dataclass(frozen=True)
class PretrainedModel:
    """A dual encoder read from another library."""

    encoder: DualEncoder
    config: ModelConfig
    """Configuration of the same towers."""
    tokenizer: str
    """Name or folder for `load_tokenizer`."""
    drop_punctuation: bool
    """True if its training captions were lower-cased and stripped of punctuation."""
    notes: list[str]
    """Weights that were converted or left out, one line each."""


def read_open_clip(source: str) -> PretrainedModel:
    """Read open_clip's `MODEL`, `MODEL/TAG`, `MODEL/FILE` (weights), `hf-hub:USER/MODEL` or `local-dir:FOLDER`.

    Raises:
        UserError: open_clip has no such model, or its weights cannot be loaded.
    """
    import open_clip

    local = source.startswith("local-dir:")
    complete = local or source.startswith("hf-hub:")
    name, _, pretrained = (source, "", "") if complete else source.partition("/")
    if not complete:
        if open_clip.get_model_config(name) is None:
            raise UserError(unknown_model("open_clip", name, open_clip.list_models()))
        check_quick_gelu(name, pretrained)
    try:
        with quiet(True):
            settings = open_clip.get_model_config(name)
            model = open_clip.create_model(
                name, pretrained=pretrained or None, pretrained_text=False, require_pretrained=complete
            )
    except Exception as error:  # libraries raise many kinds on files that are missing, damaged or do not fit
        raise UserError(f"open_clip could not build {source!r}: {one_line(error)}") from error
    words = settings["text_cfg"].get("tokenizer_kwargs") or {}
    if words.get("strip_sep_token", False):
        raise UserError(
            f"open_clip's {source} drops the end token of captions, which is not supported; use another model"
        )
    origin = "a folder of open_clip" if local else f"open_clip's {name}/{Path(pretrained).name}".rstrip("/")
    notes = [f"{len(model.state_dict())} weights of {origin}"]
    if settings["text_cfg"].get("hf_model_name") is not None:
        text, projection = _hugging_face_text(model.text, settings["text_cfg"], source)
        tokenizer = name.removeprefix("local-dir:") if local else settings["text_cfg"]["hf_tokenizer_name"]
    else:
        text, projection = _own_text(model, settings)
        tokenizer = settings["text_cfg"].get("hf_tokenizer_name") or "clip"
        if local and tokenizer != "clip":
            tokenizer = name.removeprefix("local-dir:")
    if not complete and not pretrained:
        notes = [f"random weights for open_clip's {source}; give {source}/TAG for trained ones"]
    if getattr(model, "logit_bias", None) is not None:
        notes.append("left out: logit_bias, which does not change rankings")
    if hasattr(model, "text_decoder"):
        notes.append("left out: the text decoder, which is used for captioning only")
    built = None if complete else name
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
            f"{type(text.proj).__name__}; only mean or cls pooling with a linear projection is supported"
        )
    transformer = text.transformer.float()
    longest = int(settings.get("context_length", 77))
    pad_id = getattr(transformer.config, "pad_token_id", None) or 0
    return TextTower(transformer, pooling, max_tokens=longest, pad_id=pad_id), text.proj.weight.detach()


def _assembled(
    model: Any,
    settings: dict[str, Any],
    text: TextTower,
    projection: Tensor | None,
    tokenizer: str,
    notes: list[str],
    name: str | None,
) -> PretrainedModel:
    """The dual encoder of an open_clip model and its converted text tower."""
    import open_clip

    preprocessing = open_clip.get_model_preprocess_cfg(model)
    fit, interpolation = preprocessing["resize_mode"], preprocessing["interpolation"]
    if fit not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear"):
        raise UserError(f"resize mode {fit!r} with {interpolation!r} interpolation is not supported; use another model")
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
        text=text.to_config(tokenizer, settings["text_cfg"].get("context_length", 77)),
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
    return PretrainedModel(encoder, config, tokenizer, words.get("clean") == "canonicalize", notes)


def _vision_config(settings: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Name and options of the visual tower. A custom configuration becomes a built-in one with options."""
    import open_clip
    from open_clip.model import CLIPVisionCfg

    if name is not None:
        return {"name": f"open_clip:{name}"}
    base = "ViT-B-32-quickgelu" if settings.get("quick_gelu", False) else "ViT-B-32"
    defaults = {field.name: field.default for field in fields(CLIPVisionCfg)}
    defaults |= open_clip.get_model_config(base)["vision_cfg"]
    own = asdict(CLIPVisionCfg(**settings["vision_cfg"]))
    options = {k: v for k, v in own.items() if v != defaults[k] and k != "timm_model_pretrained"}
    return {"name": f"open_clip:{base}", "options": options}


def linear(weight: Tensor | None) -> nn.Module:
    """A projection with these weights [out, in]; the identity for a tower that projects itself."""
    if weight is None:
        return nn.Identity()
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        projection.weight.copy_(weight)
    return projection
