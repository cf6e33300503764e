"""Losses of two views that need no negatives: they keep the dimensions of the vectors apart over the global batch.

Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230, algorithm 1) and VICReg (Bardes et al. 2022, arXiv:2105.04906,
algorithm 1). `first` and `second` [n, D] are this rank's views, not normalised. Each loss is this rank's share, and the
statistics are those of all ranks' views.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.distributed import SINGLE_PROCESS, World
from mmssl.losses.common import in_float32

BATCH_NORM_EPS = 1e-5
"""Added to variances before Barlow Twins divides by their root, as batch norms do."""
VICREG_EPS = 1e-4


@in_float32
def barlow_twins(
    first: Tensor, second: Tensor, off_diagonal: float = 0.005, *, world: World = SINGLE_PROCESS
) -> Tensor:
    """Squared distance of the cross-correlation matrix [D, D] to the identity, divided by D.

    Entries off the diagonal have the weight `off_diagonal`. The paper does not divide by D.
    """
    (a, _), (b, _) = world.gather(first), world.gather(second)
    correlation = _standardised(a).T @ _standardised(b) / len(a)
    diagonal = correlation.diagonal()
    squares = correlation.square().sum() - diagonal.square().sum()
    return ((diagonal - 1).square().sum() + off_diagonal * squares) / correlation.shape[0]


@in_float32
def vicreg(
    first: Tensor,
    second: Tensor,
    invariance: float = 1.0,
    variance: float = 1.0,
    covariance: float = 0.04,
    *,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """Weighted sum of the mean squared difference of the views, of a hinge on each dimension's deviation, and of the
    squared covariances. The default weights are the paper's 25, 25 and 1, divided by 25."""
    (a, _), (b, _) = world.gather(first), world.gather(second)
    total = invariance * F.mse_loss(a, b)
    for views in (a, b):
        deviation = (views.var(0) + VICREG_EPS).sqrt()
        centred = views - views.mean(0)
        matrix = centred.T @ centred / (len(views) - 1)
        squares = matrix.square().sum() - matrix.diagonal().square().sum()
        total = total + variance * F.relu(1 - deviation).mean() / 2 + covariance * squares / views.shape[1]
    return total


def _standardised(views: Tensor) -> Tensor:
    variance, mean = torch.var_mean(views, 0, correction=0)
    return (views - mean) / (variance + BATCH_NORM_EPS).sqrt()
