"""Our towers as CLIP's towers of transformers."""

import json
from pathlib import Path
from typing import Any

import open_clip
from transformers import CLIPTextConfig, CLIPVisionConfig

from mmssl.apps.export.reader import state
from mmssl.inference import Model
from mmssl.models import OpenClipText
from mmssl.models.pretrained import to_transformers

_CLIP_PARTS = ("class_embedding", "positional_embedding", "conv1", "ln_pre", "transformer", "ln_post")
"""Parts of CLIP's vision transformer."""
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's codes."""


def vision_problems(model: Model) -> list[str]:
    """Differences of the vision tower from CLIP's."""
    trunk: Any = model.vision.trunk
    if not isinstance(trunk, open_clip.transformer.VisionTransformer):
        return [f"its vision tower {model.config.vision.name} is not CLIP's vision transformer"]
    if _differences(trunk):
        return [f"its vision transformer differs from CLIP's in {', '.join(_differences(trunk))}"]
    return []


def text_problems(model: Model) -> list[str]:
    """Differences of the text tower from CLIP's."""
    encoder = model.text.encoder
    if isinstance(encoder, OpenClipText):
        cfg = encoder.text_cfg
        odd = [key for key in ("ls_init_value", "block_type", "act_kwargs", "qk_norm") if getattr(cfg, key)]
        if encoder.projects or odd:
            return [f"its text tower is not CLIP's ({', '.join(odd) or 'it reads padding or projects with a bias'})"]
        return []
    if encoder.config.model_type != "clip_text_model" or model.text.pooling != "eos":
        return [f"its text tower is a {encoder.config.model_type!r} pooled by {model.text.pooling!r}, not CLIP's"]
    return []


def write_preprocessing(model: Model, folder: Path) -> None:
    """preprocessor_config.json of CLIP's image processor."""
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessing(model), indent=1), encoding="utf-8")


def clip_vision(model: Model) -> tuple[CLIPVisionConfig, dict[str, Any]]:
    """Configuration and weights of the vision tower as transformers' CLIPVisionModel; it has no problems."""
    trunk: Any = model.vision.trunk
    block = trunk.transformer.resblocks[0]
    config = CLIPVisionConfig(
        hidden_size=model.vision.width,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(trunk.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=model.vision.image_size,
        patch_size=model.vision.patch_size,
        hidden_act=_activation(trunk),
        layer_norm_eps=trunk.ln_post.eps,
        projection_dim=model.config.embed_dim,
    )
    return config, to_transformers(state(trunk))


def clip_text(model: Model) -> tuple[Any, dict[str, Any]]:
    """Configuration and weights of the text tower as transformers' CLIPTextModel."""
    encoder, tokenizer = model.text.encoder, model.tokenizer
    # The token that captions end in decides where the tower pools; a learnt tokenizer has its own.
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.cls_id, "eos_token_id": tokenizer.sep_id}
    if not isinstance(encoder, OpenClipText):
        return CLIPTextConfig.from_dict({**encoder.config.to_dict(), **ids}), state(encoder)
    inner = encoder.model
    block = inner.transformer.resblocks[0]
    config = CLIPTextConfig(
        vocab_size=inner.vocab_size,
        hidden_size=inner.width,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(inner.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        max_position_embeddings=inner.context_length,
        hidden_act=_activation(inner),
        layer_norm_eps=inner.ln_final.eps,
        projection_dim=model.config.embed_dim,
        **ids,
    )
    return config, to_transformers(state(inner))


def _activation(module: Any) -> str:
    quick = any(isinstance(part, open_clip.transformer.QuickGELU) for part in module.modules())
    return "quick_gelu" if quick else "gelu"


def _differences(trunk: Any) -> list[str]:
    """Parts that a vision transformer has or lacks, compared with CLIP's."""
    parts = {name.partition(".")[0] for name in trunk.state_dict()}
    odd = sorted(parts.symmetric_difference(_CLIP_PARTS))
    names = {
        name for name in trunk.transformer.state_dict() if ".ls_" in name or "ln_attn" in name or "ln_inner" in name
    }
    odd += ["its blocks"] if names else []
    odd += ["pooling"] if trunk.pool_type != "tok" or trunk.final_ln_after_pool else []
    return odd


def _preprocessing(model: Model) -> dict[str, Any]:
    side = model.vision.image_size
    mean, std = model.vision.statistics
    crop = model.config.vision.fit == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if crop else {"height": side, "width": side},
        "resample": _RESAMPLE[model.config.vision.interpolation],
        "do_center_crop": crop,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
