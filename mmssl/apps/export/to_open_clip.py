"""Export to a folder for open_clip.create_model_from_pretrained("local-dir:FOLDER")."""

import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmssl.apps.export import head
from mmssl.apps.export.reader import Reader, pillow, save_tokenizer, state
from mmssl.data.transforms import Tokenizer
from mmssl.inference import Model
from mmssl.models import OpenClipText
from mmssl.models.pretrained import to_open_clip

LABEL = "open_clip"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
_TOKENS = ("output_tokens",)
"""Settings of CoCa's towers; its captioner is not exported."""
_TEXT_KINDS = ("bert", "roberta", "xlm-roberta")
"""Hugging Face encoders that open_clip builds by their configuration."""


def usage(folder: str) -> str:
    """Python code that loads the folder."""
    return f"""import open_clip
model, preprocess = open_clip.create_model_from_pretrained("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
model.eval()  # encode_image takes preprocess(image)[None], encode_text tokenizer(texts)"""


def classifier_usage(folder: str) -> str:
    """Python code that classifies images."""
    return head.usage(folder, "model.encode_image(images, normalize=True)")


def problems(model: Model) -> list[str]:
    """Properties that open_clip has no setting for."""
    found = []
    if model.config.projection != "linear":
        found.append("its projections are MLPs, open_clip's are linear")
    name = model.config.vision.name.removeprefix("timm:")
    if model.config.vision.name.startswith("timm:"):
        others = sorted(key for key in model.config.vision.options if not key.endswith("_rate"))
        if others:
            found.append(f"open_clip gives timm towers no options ({', '.join(others)})")
        elif _shapes(timm.create_model(name, num_classes=0)) != _shapes(model.vision.trunk):
            found.append(f"open_clip builds timm's {name} only at its own image size")
    encoder = model.text.encoder
    kind = encoder.config.model_type
    if kind == "clip_text_model":
        if encoder.config.hidden_act not in ("gelu", "quick_gelu") or model.text.pooling != "eos":
            found.append(f"its text tower is pooled by {model.text.pooling} after {encoder.config.hidden_act}")
        elif _is_vit(model) and _quick_gelu(model) != (encoder.config.hidden_act == "quick_gelu"):
            found.append("its towers differ in their activation (GELU, QuickGELU), open_clip has one for both")
    elif kind != "open_clip":
        if kind not in _TEXT_KINDS:
            found.append(f"open_clip builds no {kind!r} text towers, only {', '.join(_TEXT_KINDS)}")
        if model.text.pooling not in _POOLERS:
            found.append(f"open_clip does not pool captions by {model.text.pooling!r}, only by mean and cls")
    return found


def write(model: Model, folder: Path) -> None:
    """open_clip_config.json, open_clip_model.safetensors; tokenizer and config.json of a Hugging Face text tower."""
    mean, std = model.vision.statistics
    visual, visual_state = _visual(model)
    text, text_state, top = _text(model, folder)
    settings = {"embed_dim": model.config.embed_dim, "vision_cfg": visual, "text_cfg": text, **top}
    preprocessing = {
        "size": model.vision.image_size,
        "mean": mean,
        "std": std,
        "interpolation": model.config.vision.interpolation,
        "resize_mode": model.config.vision.fit,
    }
    record = {"model_cfg": settings, "preprocess_cfg": preprocessing}
    (folder / CONFIG).write_text(json.dumps(record, indent=1), encoding="utf-8")
    scale = model.encoder.log_logit_scale.detach().cpu().reshape(())
    save_file({**visual_state, **text_state, "logit_scale": scale}, folder / WEIGHTS)


def reader(model: Model, folder: Path) -> Reader:
    """open_clip's own loader, transform and tokenizer."""
    place = f"local-dir:{folder}"
    theirs, transform = open_clip.create_model_from_pretrained(place)
    tokenizer = open_clip.get_tokenizer(place)
    theirs.eval()
    return Reader(
        lambda images: theirs.encode_image(torch.stack([transform(image) for image in pillow(images)])),
        lambda texts: theirs.encode_text(tokenizer(texts)),
    )


def rename(folder: Path, name: str) -> None:
    """Set the hub name or folder in which open_clip looks for the configuration of a Hugging Face text tower."""
    path = folder / CONFIG
    record = json.loads(path.read_text(encoding="utf-8"))
    text = record["model_cfg"]["text_cfg"]
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if key in text:
            text[key] = name
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _is_vit(model: Model) -> bool:
    return isinstance(model.vision.trunk, open_clip.transformer.VisionTransformer)


def _quick_gelu(model: Model) -> bool:
    return any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.vision.modules())


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _visual(model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """vision_cfg and weights of `visual`."""
    library, _, name = model.config.vision.name.partition(":")
    trunk, weight = model.vision.trunk, getattr(model.encoder.image_projection, "weight", None)
    if library == "timm":
        settings: dict[str, Any] = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear"}
    else:
        settings = {**open_clip.get_model_config(name)["vision_cfg"], **model.config.vision.options}
        settings = {key: value for key, value in settings.items() if key not in ("timm_model_pretrained", *_TOKENS)}
    settings["image_size"] = model.vision.image_size
    if model.vision.projects:
        # timm's own head projects inside the trunk of open_clip's wrapper.
        inside = type(trunk).__module__.partition(".")[0] == "timm"
        return settings, state(trunk, "visual.trunk." if inside else "visual.")
    assert weight is not None
    if _is_vit(model):
        return settings, {**state(trunk, "visual."), "visual.proj": weight.detach().cpu().T.contiguous()}
    tensors = state(trunk, "visual.trunk.")
    if settings.get("timm_proj", "linear") == "linear":
        return settings, {**tensors, "visual.head.proj.weight": weight.detach().cpu().contiguous()}
    if not torch.equal(weight.detach().cpu(), torch.eye(len(weight))):  # trained since it was taken over
        settings["timm_proj"] = "linear"
        tensors["visual.head.proj.weight"] = weight.detach().cpu().contiguous()
    return settings, tensors


def _text(model: Model, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """text_cfg, weights, and settings of the whole model."""
    encoder, quick = model.text.encoder, {"quick_gelu": True} if _quick_gelu(model) else {}
    if not isinstance(encoder, OpenClipText):
        save_tokenizer(model.tokenizer, folder)
        files = {"hf_tokenizer_name": str(folder), "context_length": model.tokenizer.max_tokens}
        if encoder.config.model_type == "clip_text_model":
            settings, tensors = _clip_text(encoder, model.tokenizer)
            top = {"quick_gelu": True} if encoder.config.hidden_act == "quick_gelu" else {}
            return {**settings, **files}, {**tensors, "text_projection": _text_weight(model).T.contiguous()}, top
        encoder.config.save_pretrained(folder)
        names = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_proj_type": "linear"}
        names["hf_pooler_type"] = _POOLERS[model.text.pooling]
        return (
            {**names, **files},
            {**state(encoder, "text.transformer."), "text.proj.weight": _text_weight(model)},
            quick,
        )
    kept = {key: value for key, value in encoder.config.settings.items() if key not in ("output_dim", *_TOKENS)}
    top = {key: kept.pop(key) for key in ("quick_gelu", "custom_text") if key in kept}
    if kept.get("hf_tokenizer_name"):
        save_tokenizer(model.tokenizer, folder)
    tensors = state(encoder.model)
    if not encoder.projects:
        tensors["text_projection"] = _text_weight(model).T.contiguous()
    prefix = "text." if top.get("custom_text", False) else ""
    return kept, {f"{prefix}{name}": tensor for name, tensor in tensors.items()}, top


def _text_weight(model: Model) -> Tensor:
    return state(model.encoder.text_projection)["weight"]


def _clip_text(encoder: Any, tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A CLIPTextModel of transformers as open_clip's TextTransformer for the captions of a tokenizer."""
    config = encoder.config
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "pool_type": "eos",
        "eos_id": tokenizer.sep_id,
    }
    if config.layer_norm_eps != 1e-5:
        settings["norm_kwargs"] = {"eps": config.layer_norm_eps}
    tensors = to_open_clip(state(encoder))
    tensors["positional_embedding"] = tensors["positional_embedding"][: tokenizer.max_tokens].contiguous()
    return settings, tensors
