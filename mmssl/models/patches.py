"""Vectors of single patches in the space of whole images, as in MaskCLIP (Zhou et al. 2022).

Pooling is given the features of one patch in every place. A mean returns them, attention their value. A tower that
reads a class token never pools its patches, so in its last block each of them attends to itself alone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.errors import UserError, one_line
from mmssl.models.vision import VisionTower, open_clip_class

_CLASS_TOKEN_TRUNKS = ("VisionTransformer", "Eva")
"""Trunks of timm whose last block hands the class token to the pooling."""


def patch_features(tower: VisionTower, images: Tensor) -> Tensor:
    """One vector per patch, or per place of the last feature map, where the tower has its pooled vector.

    Args:
        images: uint8 [B, 3, image_size, image_size].

    Returns:
        [B, places, places, width]; rows of the image first.

    Raises:
        UserError: the tower has no tokens, or pools them in a way that says nothing about one of them.
    """
    trunk, kind = tower.trunk, type(tower.trunk).__name__
    if tower.places is None:
        raise UserError(f"this vision tower ({kind}) shows no patches; use a ViT or a ResNet of open_clip or timm")
    x = tower.normalize(images).contiguous(memory_format=torch.channels_last)
    try:
        if isinstance(trunk, open_clip_class("transformer", "VisionTransformer")):
            found = _open_clip_vit(trunk, x)
        elif isinstance(trunk, open_clip_class("modified_resnet", "ModifiedResNet")):
            found = _open_clip_resnet(tower, x)
        else:
            found = _timm(tower, x)
        return found.reshape(len(x), tower.places, tower.places, tower.width)
    except UserError:
        raise
    except Exception as error:  # trunks raise many kinds where one patch is no input for a part of theirs
        raise UserError(f"this vision tower ({kind}) cannot pool one patch alone: {one_line(error, 200)}") from error


def _open_clip_vit(trunk: Any, x: Tensor) -> Tensor:
    by_class_token = trunk.attn_pool is None and trunk.pool_type == "tok"
    stack = trunk.transformer
    with _alone(stack.resblocks[-1], stack.batch_first) if by_class_token else nullcontext():
        patches = stack(trunk._embeds(x))[:, 1:].flatten(0, 1)
    pooled: Tensor = trunk._pool(patches.unsqueeze(1).expand(-1, 2, -1))[0]
    return pooled


def _open_clip_resnet(tower: VisionTower, x: Tensor) -> Tensor:
    """The values of the attention pooling, without its positions, which belong to the pooled map."""
    tokens = tower._encode(x).tokens
    pool = tower.trunk.attnpool
    projected: Tensor = pool.c_proj(pool.v_proj(tokens))
    return projected


def _timm(tower: VisionTower, x: Tensor) -> Tensor:
    trunk, kind = tower.trunk, type(tower.trunk).__name__
    if any(type(module).__name__.endswith("AttentionPool2d") for module in trunk.modules()):
        raise UserError(f"this vision tower ({kind}) pools by attention over positions; a patch alone has no vector")
    by_class_token = getattr(trunk, "global_pool", None) == "token" and getattr(trunk, "attn_pool", None) is None
    if by_class_token and kind not in _CLASS_TOKEN_TRUNKS:
        raise UserError(f"this vision tower ({kind}) reads its class token only; its patches have no vectors")
    with _alone(trunk.blocks[-1]) if by_class_token else nullcontext():
        features = trunk.forward_features(x)
    tokens = tower._tokens(features)
    assert tokens is not None
    assert math.prod(tokens.shape[:2]) == len(x) * (tower.places or 0) ** 2
    patches = tokens.flatten(0, 1)
    if features.ndim == 3:
        single = patches.unsqueeze(1).expand(-1, trunk.num_prefix_tokens + 1, -1)
    elif features.shape[-1] == trunk.num_features != features.shape[1]:  # channels last
        single = patches[:, None, None, :]
    else:
        single = patches[:, :, None, None]
    pooled: Tensor = trunk.forward_head(single, pre_logits=not tower.projects)
    return pooled


@contextmanager
def _alone(block: nn.Module, batch_first: bool = True) -> Iterator[None]:
    """While this is open, every token is a sequence of its own for a transformer block."""
    shape = torch.Size()

    def split(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal shape
        shape = inputs[0].shape
        alone = (-1, 1, shape[-1]) if batch_first else (1, -1, shape[-1])
        # Positions and masks act between tokens.
        rest = {name: None if name in ("rope", "attn_mask") else value for name, value in options.items()}
        return (inputs[0].reshape(alone), *inputs[1:]), rest

    def join(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.reshape(shape)

    hooks = (block.register_forward_pre_hook(split, with_kwargs=True), block.register_forward_hook(join))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
