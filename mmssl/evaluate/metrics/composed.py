"""Searches by an image and a text together, as a weighted sum of their unit vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.evaluate.metrics import ranking

HALF = 0.5


def compose(images: Tensor, texts: Tensor, text_weight: float = HALF) -> Tensor:
    """Unit vectors of (1 - text_weight) * image + text_weight * text, [Q, D]; at one half, of the plain sum.

    Args:
        images, texts: unit vectors, [Q, D].
    """
    return F.normalize((1 - text_weight) * images + text_weight * texts, dim=-1)


def target_ranks(queries: Tensor, gallery: Tensor, target: Tensor, left_out: Tensor) -> Tensor:
    """The rank of each query's target in the gallery, from 1; an equally similar image counts as better. int64 [Q].

    Args:
        queries: unit vectors, [Q, D]. gallery: unit vectors, [N, D].
        target: row of the right image, int64 [Q].
        left_out: row of an image that does not compete, int64 [Q].
    """
    found = []
    parts = (ranking.blocks(rows, len(gallery)) for rows in (queries, target, left_out))
    for block, right, own in zip(*parts, strict=True):
        scores = block @ gallery.T
        best = scores.gather(1, right[:, None])
        scores.scatter_(1, own[:, None], -torch.inf)
        found.append((scores >= best).sum(dim=1))  # the target itself among them
    return torch.cat(found)
