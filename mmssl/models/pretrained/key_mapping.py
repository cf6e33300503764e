"""Names of weights in other libraries: CLIP's in open_clip and transformers, SigLIP's vision tower in timm."""

from collections.abc import Mapping

import torch
from torch import Tensor

_TOP = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    **{f"ln_pre.{kind}": f"pre_layrnorm.{kind}" for kind in ("weight", "bias")},
    **{f"ln_post.{kind}": f"post_layernorm.{kind}" for kind in ("weight", "bias")},
    **{f"ln_final.{kind}": f"final_layer_norm.{kind}" for kind in ("weight", "bias")},
}
"""open_clip's names outside blocks -> transformers'."""
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
"""The same inside a block. open_clip stacks the weights of queries, keys and values; transformers does not."""
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
"""transformers' names of SigLIP's vision tower -> timm's."""
_BLOCK, _LAYER = "transformer.resblocks.", "encoder.layers."
_QKV = ("q", "k", "v")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an open_clip VisionTransformer or TextTransformer, without its projection, for transformers.

    Raises:
        KeyError: a weight that CLIP's towers do not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(_BLOCK):
            renamed[_TOP[name]] = tensor
            continue
        number, _, inner = name.removeprefix(_BLOCK).partition(".")
        part, _, kind = inner.rpartition(".")
        if inner.startswith("attn.in_proj_"):
            kind = inner.removeprefix("attn.in_proj_")
            for letter, third in zip(_QKV, tensor.chunk(3), strict=True):
                renamed[f"{_LAYER}{number}.self_attn.{letter}_proj.{kind}"] = third
        else:
            renamed[f"{_LAYER}{number}.{_PARTS[part]}.{kind}"] = tensor
    return renamed


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_transformers`.

    Raises:
        KeyError: a weight that CLIP's towers do not have.
    """
    top = {theirs: ours for ours, theirs in _TOP.items()}
    parts = {theirs: ours for ours, theirs in _PARTS.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(_LAYER):
            renamed[top[name]] = tensor
            continue
        number, _, inner = name.removeprefix(_LAYER).partition(".")
        part, _, kind = inner.rpartition(".")
        if part == "self_attn.q_proj":
            layers = (f"{_LAYER}{number}.self_attn.{letter}_proj.{kind}" for letter in _QKV)
            renamed[f"{_BLOCK}{number}.attn.in_proj_{kind}"] = torch.cat([state[layer] for layer in layers])
        elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
            renamed[f"{_BLOCK}{number}.{parts[part]}.{kind}"] = tensor
    return renamed


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
