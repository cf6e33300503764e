"""Grad-CAM (Selvaraju et al. 2017) at any stage of a convolutional or window tower."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmssl.errors import UserError
from mmssl.models import DualEncoder

MIN_SIDE = 7
"""Least number of places per side of the stage: the deepest such stage is the last one of common towers at 224 px."""


class Stage(NamedTuple):
    """Activations of one stage and the gradient of the similarity with respect to them, both [B, C, h, w]."""

    values: Tensor
    gradients: Tensor


def gradcam(encoder: DualEncoder, images: Tensor, texts: Tensor, min_side: int = MIN_SIDE) -> Tensor:
    """Grad-CAM: the sum of channels weighted by their mean gradient, without negative values (eq. 1 and 2), [B, h, w].

    Args:
        images: uint8 [B, 3, S, S].
        texts: unit-length embeddings [B, D].
        min_side: least number of places per side of the stage. If no stage has that many, the finest one is used.

    Raises:
        UserError: the tower does not name its stages.
    """
    stage = activations(encoder, images, texts, min_side)
    weights = stage.gradients.mean((2, 3), keepdim=True)
    return (weights * stage.values).sum(1).clamp(min=0)


def activations(encoder: DualEncoder, images: Tensor, texts: Tensor, min_side: int) -> Stage:
    """The deepest stage with at least `min_side` places per side, for the similarity of each image and its text.

    Raises:
        UserError: the tower does not name its stages.
    """
    stages = _stages(encoder.vision.trunk)
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        outputs[module] = output
        # Later layers may work in place.
        return output.clone()

    handles = [module.register_forward_hook(keep) for module in stages]
    try:
        with torch.enable_grad():
            score = (encoder.encode_image(images.float().requires_grad_()) * texts).sum()
    finally:
        for handle in handles:
            handle.remove()
    maps = {module: _channels_first(outputs[module], channels) for module, channels in stages.items()}
    fits = [module for module, output in maps.items() if min(output.shape[2:]) >= min_side]
    chosen = fits[-1] if fits else next(iter(maps))
    gradients = torch.autograd.grad(score, outputs[chosen])[0]
    return Stage(maps[chosen].detach(), _channels_first(gradients, stages[chosen]).detach())


def has_stages(trunk: nn.Module) -> bool:
    """True if the library of the tower names its stages, which Grad-CAM needs."""
    return getattr(trunk, "feature_info", None) is not None or hasattr(trunk, "layer4")


def _stages(trunk: Any) -> dict[nn.Module, int | None]:
    """The stages in execution order, with their channels where these identify the layout."""
    if not has_stages(trunk):
        raise UserError("this vision tower does not name its stages; use occlusion")
    if getattr(trunk, "feature_info", None) is None:  # CLIP's own ResNets
        return {getattr(trunk, f"layer{n}"): None for n in (1, 2, 3, 4)}
    entries = [trunk.feature_info[i] for i in range(len(trunk.feature_info))]
    return {trunk.get_submodule(entry["module"]): entry["num_chs"] for entry in entries}


def _channels_first(output: Tensor, channels: int | None) -> Tensor:
    """[B, C, h, w]; window transformers (Swin) keep channels last."""
    if output.ndim != 4:
        raise UserError("the stages of this vision tower are not maps; use relevance or occlusion")
    return output.permute(0, 3, 1, 2) if channels is not None and output.shape[1] != channels else output
