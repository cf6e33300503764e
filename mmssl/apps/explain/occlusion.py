"""Parts of images covered, and what that does to the similarity to a text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.models.dual_encoder import DualEncoder
from mmssl.rng import torch_generator

CELLS = 8
"""Patches a side that are covered one at a time."""
MASKS = 256
"""Random coverings of an image."""
BATCH = 256


def occlusion(encoder: DualEncoder, images: Tensor, texts: Tensor, cells: int = CELLS) -> Tensor:
    """How much the similarity falls when a patch is covered with the image's ground (Zeiler and Fergus 2013),
    [B, cells, cells]; below zero where covering raises it.

    Args:
        images: uint8 [B, 3, S, S].
        texts: unit vectors [B, D].
    """
    single = torch.eye(cells * cells, dtype=torch.bool, device=images.device).view(-1, cells, cells)
    whole = similarities(encoder, images, texts)
    fallen = [
        whole[row] - similarities(encoder, covered(image.expand(len(single), -1, -1, -1), single), texts[row])
        for row, image in enumerate(images)
    ]
    return torch.stack(fallen).view(-1, cells, cells)


def rise(encoder: DualEncoder, images: Tensor, texts: Tensor, cells: int = CELLS, masks: int = MASKS) -> Tensor:
    """How much a patch adds to the similarity while any half of the others is covered, [B, cells, cells].

    The similarities of randomly covered images (RISE, Petsiuk et al. 2018) are fitted by a sum of the visible
    patches' effects, which are then their Banzhaf values (Hammer and Holzman 1992). They show what single patches do
    not, where one part of a thing stands in for another.

    Args:
        images: uint8 [B, 3, S, S].
        texts: unit vectors [B, D].
        masks: random coverings, more than there are patches.
    """
    visible = torch.rand(masks, cells, cells, generator=torch_generator("rise")) < 0.5
    design = torch.cat([visible.double().flatten(1), torch.ones(masks, 1, dtype=torch.float64)], 1)
    fit = torch.linalg.pinv(design)[:-1].float().to(images.device)
    hidden = ~visible.to(images.device)
    effects = [
        fit @ similarities(encoder, covered(image.expand(masks, -1, -1, -1), hidden), text)
        for image, text in zip(images, texts, strict=True)
    ]
    return torch.stack(effects).view(-1, cells, cells)


def covered(images: Tensor, cells: Tensor) -> Tensor:
    """Images [B, 3, S, S] with the marked patches, bool [B, g, g], painted in the mean colour of each image's
    border: the ground of a drawing, a plain tone in a photograph."""
    side = images.shape[-1]
    border = torch.ones(side, side, dtype=torch.bool, device=images.device)
    border[1:-1, 1:-1] = False
    ground = images[:, :, border].float().mean(-1).round().to(images.dtype)
    mask = F.interpolate(cells[:, None].float(), size=(side, side), mode="nearest").bool()
    return torch.where(mask, ground[:, :, None, None], images)


@torch.no_grad()
def similarities(encoder: DualEncoder, images: Tensor, texts: Tensor) -> Tensor:
    """Cosine similarities [B] of images [B, 3, S, S] to their texts, unit vectors [B, D] or one [D] for all."""
    features = torch.cat([encoder.encode_image(part) for part in torch.split(images, BATCH)])
    return (features * texts).sum(-1)
