"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4)."""

import torch
from torch import Tensor

NEIGHBOURS = 20
TEMPERATURE = 0.07
_SCORES_PER_BLOCK = 1 << 24


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
    votes = torch.zeros(len(features), classes)
    step = max(1, _SCORES_PER_BLOCK // len(train))
    for start in range(0, len(features), step):
        nearest = (features[start : start + step] @ train.T).topk(k, dim=1)
        # Relative to the nearest: the same order, and no overflow.
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        votes[start : start + step].scatter_add_(1, labels[nearest.indices], weights)
    return votes
