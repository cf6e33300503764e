"""Maps from covering patches of an image and measuring the similarity to a text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.models import DualEncoder
from mmssl.rng import torch_generator

GRID = 8
"""Patches per side of the grid."""
MASKS = 256
"""Random coverings per image."""
BATCH = 256


def occlusion(encoder: DualEncoder, images: Tensor, texts: Tensor, grid: int = GRID) -> Tensor:
    """Decrease of the similarity when a patch is covered with the image's border colour (Zeiler and Fergus 2013),
    [B, grid, grid]; negative where covering raises it.

    Args:
        images: uint8 [B, 3, S, S].
        texts: unit-length embeddings [B, D].
    """
    single = torch.eye(grid * grid, dtype=torch.bool, device=images.device).view(-1, grid, grid)
    uncovered = text_similarities(encoder, images, texts)
    decreases = [
        uncovered[row] - text_similarities(encoder, cover(image.expand(len(single), -1, -1, -1), single), texts[row])
        for row, image in enumerate(images)
    ]
    return torch.stack(decreases).view(-1, grid, grid)


def rise(encoder: DualEncoder, images: Tensor, texts: Tensor, grid: int = GRID, masks: int = MASKS) -> Tensor:
    """Mean effect of a patch on the similarity while a random half of the others is covered, [B, grid, grid].

    The similarities of randomly covered images (RISE, Petsiuk et al. 2018) are fitted by a sum of the effects of the
    visible patches, which are then their Banzhaf values (Hammer and Holzman 1992). Unlike `occlusion`, they show
    patches that can replace each other.

    Args:
        images: uint8 [B, 3, S, S].
        texts: unit-length embeddings [B, D].
        masks: number of random coverings, more than patches.
    """
    visible = torch.rand(masks, grid, grid, generator=torch_generator("rise")) < 0.5
    design = torch.cat([visible.double().flatten(1), torch.ones(masks, 1, dtype=torch.float64)], 1)
    fit = torch.linalg.pinv(design)[:-1].float().to(images.device)
    hidden = ~visible.to(images.device)
    effects = [
        fit @ text_similarities(encoder, cover(image.expand(masks, -1, -1, -1), hidden), text)
        for image, text in zip(images, texts, strict=True)
    ]
    return torch.stack(effects).view(-1, grid, grid)


def cover(images: Tensor, marked: Tensor) -> Tensor:
    """Images [B, 3, S, S] with the marked patches, bool [B, g, g], painted in the mean colour of each image's border:
    the background of a drawing, a plain tone in a photograph."""
    side = images.shape[-1]
    border = torch.ones(side, side, dtype=torch.bool, device=images.device)
    border[1:-1, 1:-1] = False
    ground = images[:, :, border].float().mean(-1).round().to(images.dtype)
    mask = F.interpolate(marked[:, None].float(), size=(side, side), mode="nearest").bool()
    return torch.where(mask, ground[:, :, None, None], images)


@torch.no_grad()
def text_similarities(encoder: DualEncoder, images: Tensor, texts: Tensor) -> Tensor:
    """Cosine similarities [B] of images [B, 3, S, S] to their texts: unit-length embeddings [B, D], or one [D]."""
    features = torch.cat([encoder.encode_image(part) for part in torch.split(images, BATCH)])
    return (features * texts).sum(-1)
