"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4)."""

import torch
from torch import Tensor

from mmssl.evaluate.metrics.ranking import blocks

NEIGHBOURS = 20
TEMPERATURE = 0.07


def knn_scores(
    features: Tensor,
    train: Tensor,
    labels: Tensor,
    classes: int,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Votes for each class, [N, C]: each of the k most similar training rows votes exp(similarity / temperature).

    Args:
        features: normed, [N, D]. train: normed, [M, D].
        labels: of the training rows, int64 [M].
        k: at most M.
    """
    assert 1 <= k <= len(train)
    votes = []
    for block in blocks(features, len(train)):
        nearest = (block @ train.T).topk(k, dim=1)
        # Relative to the nearest: the same order, and no overflow.
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(block), classes).scatter_add_(1, labels[nearest.indices], weights))
    return torch.cat(votes)
