"""Export to a folder for transformers' AutoModel: a CLIPModel, if both towers have CLIP's architecture."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from transformers import AutoModel, AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from mmssl.apps.export.probe_inputs import CAPTIONS, images, largest_difference, normalized, state
from mmssl.inference import Model
from mmssl.models import OpenClipText
from mmssl.models.pretrained import to_transformers

LABEL = "transformers"
_CLIP_PARTS = ("class_embedding", "positional_embedding", "conv1", "ln_pre", "transformer", "ln_post")
"""Parts of CLIP's vision transformer."""
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's codes."""


def usage(folder: str) -> str:
    """Python code that loads the folder."""
    return f"""from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
model = AutoModel.from_pretrained("{folder}")  # get_image_features, get_text_features
tokenizer, processor = AutoTokenizer.from_pretrained("{folder}"), AutoImageProcessor.from_pretrained("{folder}")"""


def problems(model: Model) -> list[str]:
    """Properties that CLIPModel cannot express."""
    found = []
    if model.config.projection != "linear":
        found.append("its projections are MLPs, CLIPModel's are linear")
    return found + vision_problems(model) + text_problems(model)


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


def write(model: Model, folder: Path) -> None:
    """config.json, model.safetensors, the tokenizer and preprocessor_config.json."""
    text, text_state = clip_text(model)
    vision, vision_state = clip_vision(model)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=model.config.embed_dim
    )
    theirs = CLIPModel(config)
    tensors = {f"text_model.{name}": tensor for name, tensor in text_state.items()}
    tensors |= {f"vision_model.{name}": tensor for name, tensor in vision_state.items()}
    tensors |= state(model.encoder.image_projection, "visual_projection.")
    tensors |= state(model.encoder.text_projection, "text_projection.")
    tensors["logit_scale"] = model.encoder.log_logit_scale.detach().cpu().reshape(())
    theirs.load_state_dict(tensors)
    theirs.save_pretrained(folder)
    model.tokenizer.save(folder)
    write_preprocessing(model, folder)


def write_preprocessing(model: Model, folder: Path) -> None:
    """preprocessor_config.json of CLIP's image processor."""
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessing(model), indent=1), encoding="utf-8")


def difference(model: Model, folder: Path) -> float:
    """Compare with AutoModel and AutoTokenizer."""
    theirs = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = model.tokenizer.max_tokens
    words = tokenizer(list(CAPTIONS), padding=True, truncation=True, max_length=length, return_tensors="pt")
    pixels = images(model)
    with torch.no_grad():
        output = theirs(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            pixel_values=normalized(model, pixels),
        )
    texts = largest_difference(output.text_embeds, model.encode_text(list(CAPTIONS)))
    return max(texts, largest_difference(output.image_embeds, model.encode_rendered(pixels)))


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
    encoder = model.text.encoder
    if not isinstance(encoder, OpenClipText):
        return encoder.config, state(encoder)
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
        pad_token_id=model.tokenizer.pad_id,
        bos_token_id=model.tokenizer.cls_id,
        eos_token_id=model.tokenizer.sep_id,
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
