"""SiglipModel of transformers: its vision tower as timm's, its text tower as open_clip's, which sees padding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmssl.config import VisionConfig
from mmssl.errors import UserError
from mmssl.models.pretrained.key_mapping import to_open_clip
from mmssl.models.text import TextTower
from mmssl.models.text_open_clip import build_open_clip_text

_ACTIVATIONS = {"gelu": ("gelu", None), "gelu_pytorch_tanh": ("gelu_tanh", {"approximate": "tanh"})}
"""transformers' name -> timm's name and open_clip's arguments of GELU."""
_TIMM = (
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("post_layernorm.", "norm."),
    ("encoder.layers.", "blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.out_proj.", ".attn.proj."),
    ("head.probe", "attn_pool.latent"),
    ("head.attention.out_proj.", "attn_pool.proj."),
    ("head.layernorm.", "attn_pool.norm."),
    ("head.mlp.", "attn_pool.mlp."),
)
"""transformers' names of the vision tower -> timm's."""


def siglip_vision(vision: Any, preprocessing: Mapping[str, Any]) -> VisionConfig:
    """timm's tower of the same form as transformers' `SiglipVisionConfig`.

    Raises:
        UserError: its activation is unknown, or it does not pool.
    """
    if vision.hidden_act not in _ACTIVATIONS or not getattr(vision, "vision_use_head", True):
        raise UserError(f"a SigLIP vision tower with {vision.hidden_act} or without pooling cannot be taken over")
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


def siglip_text(text: Any, pad_id: int) -> TextTower:
    """transformers' SiglipTextModel as open_clip's transformer, which pools its last token and projects with a bias.

    Raises:
        UserError: its activation is unknown.
    """
    config = text.config
    if config.hidden_act not in _ACTIVATIONS:
        raise UserError(f"a SigLIP text tower with {config.hidden_act} cannot be taken over")
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


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' SigLIP vision tower under timm's names."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "embeddings.position_embedding.weight":
            renamed["pos_embed"] = tensor.unsqueeze(0)
        elif ".self_attn.q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{letter}_proj.")] for letter in ("q", "k", "v")]
            block, _, kind = name.partition(".self_attn.q_proj.")
            renamed[f"{block.replace('encoder.layers.', 'blocks.')}.attn.qkv.{kind}"] = torch.cat(parts)
        elif name.startswith("head.attention.in_proj_"):
            kind, width = name.removeprefix("head.attention.in_proj_"), len(tensor) // 3
            renamed |= {f"attn_pool.q.{kind}": tensor[:width], f"attn_pool.kv.{kind}": tensor[width:]}
        elif ".k_proj." not in name and ".v_proj." not in name:
            for theirs, ours in _TIMM:
                name = name.replace(theirs, ours)
            renamed[name] = tensor
    return renamed
