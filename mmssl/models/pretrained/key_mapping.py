"""CLIP's weights under open_clip's names and under transformers' names; the tensors are the same."""

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
"""open_clip's names of a tower -> transformers', outside of its blocks."""
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
"""The same inside a block. open_clip stacks the weights of queries, keys and values, which transformers keeps apart."""
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
