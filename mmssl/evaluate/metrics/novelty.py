"""Detection of the unknown: scores that are high for what is known, and low for what is not."""

import math

import torch
from torch import Tensor

from mmssl.evaluate.metrics import ranking


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Probability that a known sample scores higher than an unknown one; equal scores count half. [N], [M]."""
    below, equal_or_below = _places(known, unknown)
    return float((below + equal_or_below).double().mean() / (2 * len(unknown)))


def fpr_at(known: Tensor, unknown: Tensor, recall: float = 0.95) -> float:
    """Fraction of unknown samples that pass the highest threshold which at least `recall` of the known ones pass.

    Args:
        known: [N]. unknown: [M].
    """
    needed = math.ceil(recall * len(known) - 1e-9)
    threshold = known.sort(descending=True).values[needed - 1]
    return ranking.share(unknown >= threshold)


def _places(known: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
    """The number of unknown scores below each known one, and the number below or equal."""
    ordered = unknown.sort().values
    return torch.searchsorted(ordered, known), torch.searchsorted(ordered, known, right=True)
