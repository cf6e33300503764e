"""Where in an image a caption comes from: the methods by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.apps.explain.attention import attention_relevance
from mmssl.apps.explain.gradcam import gradcam, has_stages, hirescam
from mmssl.apps.explain.occlusion import occlusion, rise
from mmssl.errors import UserError
from mmssl.models.dual_encoder import DualEncoder
from mmssl.models.vision import VisionTower

Method = Callable[[DualEncoder, Tensor, Tensor], Tensor]
"""Encoder, images uint8 [B, 3, S, S] and unit vectors [B, D] of their texts -> maps [B, h, w], more is more."""


def token_similarity(encoder: DualEncoder, images: Tensor, texts: Tensor) -> Tensor:
    """The cosine similarity of each place's projected token and the text, less the image's mean, [B, rows, columns].

    Exact where the tower averages its tokens (class activation maps, Zhou et al. 2016); for towers with a class token,
    whose other tokens were not trained for this, a heuristic (MaskCLIP, Zhou et al. 2022).

    Raises:
        UserError: the tower gives no tokens, or none that can be projected.
    """
    tower = encoder.vision
    if tower.places is None or tower.token_width != tower.width:
        raise UserError("this vision tower has no tokens in the shared space; use gradcam, relevance or occlusion")
    with torch.no_grad():
        tokens = tower(images).tokens
        assert tokens is not None
        found = (encoder.project_image(tokens) * texts[:, None]).sum(-1)
    return (found - found.mean(1, keepdim=True)).view(-1, tower.places, tower.places)


METHODS: dict[str, Method] = {
    "gradcam": gradcam,
    "hirescam": hirescam,
    "relevance": attention_relevance,
    "similarity": token_similarity,
    "occlusion": occlusion,
    "rise": rise,
}
"""Every method; which a tower allows, `methods_of` says."""
DEFAULT = "rise"
"""What is taken where no method is named: it looks at any tower, and its deletion curves fell the fastest by far
(docs/report.md). It encodes an image 256 times, occlusion 64 times, the others once."""


def methods_of(tower: VisionTower) -> list[str]:
    """The methods that can look at a tower."""
    possible = {
        "gradcam": tower.grid is None and has_stages(tower.trunk),
        "hirescam": tower.grid is None and has_stages(tower.trunk),
        "relevance": tower.grid is not None,
        "similarity": tower.places is not None and tower.token_width == tower.width,
        "occlusion": True,
        "rise": True,
    }
    return [name for name in METHODS if possible[name]]


def image_maps(encoder: DualEncoder, images: Tensor, texts: Tensor, method: str | None = None) -> Tensor:
    """Where in each image its text comes from, float32 [B, h, w] on the method's own grid; more is more.

    Args:
        encoder: `mmssl.load(...).encoder`; it is looked at in evaluation mode.
        images: uint8 [B, 3, S, S], S = `encoder.vision.image_size`.
        texts: unit vectors [B, D].
        method: a name in `METHODS`. Default: `DEFAULT`.

    Raises:
        UserError: there is no such method, or it cannot look at this tower.
    """
    name = method or DEFAULT
    if name not in METHODS:
        raise UserError(f"no method {name!r}; there are {', '.join(METHODS)}")
    training = encoder.training
    encoder.eval()
    try:
        return METHODS[name](encoder, images, texts).detach().float()
    finally:
        encoder.train(training)


def heat(maps: Tensor, side: int) -> Tensor:
    """Maps [B, h, w] as they are shown: what speaks for the text only, in 0..1 per image, [B, side, side]."""
    shown = F.interpolate(maps[:, None].clamp(min=0), size=(side, side), mode="bilinear", align_corners=False)[:, 0]
    return shown / shown.amax((1, 2), keepdim=True).clamp(min=1e-12)
