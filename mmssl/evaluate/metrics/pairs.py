"""Hard pairs: the right caption among wrong ones, and pairs of pairs with the same words (Thrush et al. 2022)."""

import torch
from torch import Tensor

TEXT_CHANCE, GROUP_CHANCE = 1 / 4, 1 / 6
"""Two of two comparisons; both right similarities above both wrong ones: 2! 2! of 4! orders."""


def right_first(own: Tensor, wrong: Tensor, owner: Tensor) -> Tensor:
    """True where the right caption is more similar than every wrong one; equal ones do not count. bool [N].

    Args:
        own: similarity of each image to its caption, [N].
        wrong: similarities to wrong captions, [M]. owner: the image of each, int64 [M]; every image has one.
    """
    best = torch.full_like(own, -torch.inf).scatter_reduce_(0, owner, wrong, "amax")
    return own > best


def group_scores(similarities: Tensor) -> dict[str, Tensor]:
    """Winoground's scores of groups of two images and their two captions, bool [G] each.

    `text_score`: for both images the own caption is the more similar one. `image_score`: for both captions the own
    image. `group_score`: both. Equal similarities do not count.

    Args:
        similarities: of image i (row) and caption j (column) of each group, [G, 2, 2].
    """
    own = similarities.diagonal(dim1=1, dim2=2)  # [G, 2]
    other_caption = torch.stack([similarities[:, 0, 1], similarities[:, 1, 0]], dim=1)
    other_image = torch.stack([similarities[:, 1, 0], similarities[:, 0, 1]], dim=1)
    text, image = ((own > other).all(dim=1) for other in (other_caption, other_image))
    return {"text_score": text, "image_score": image, "group_score": text & image}
