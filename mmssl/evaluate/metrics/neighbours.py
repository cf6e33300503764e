"""Search of images by images: the nearest ones should have the same label (Musgrave et al. 2020)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.evaluate.metrics import ranking


@dataclass(frozen=True)
class SameLabel:
    """The search of each of Q images, those whose label others have too, among all other images."""

    queries: Tensor
    """Rows of the images that searched, int64 [Q]."""
    first: Tensor
    """True where the nearest image has the same label, bool [Q]."""
    average_precision: Tensor
    """Average precision at R, where R other images have the label: the mean over the first R places of the precision
    there, 0 at a place with another label. float64 [Q]."""
    right: Tensor
    """R of each, int64 [Q]."""


def search_same_label(features: Tensor, labels: Tensor) -> SameLabel:
    """Search every image among all others. Only a block of the similarities exists at a time.

    Args:
        features: unit vectors, [N, D]. labels: int64 [N].
    """
    others = torch.bincount(labels)[labels] - 1
    queries = (others > 0).nonzero()[:, 0]
    first, precisions = [], []
    depth = int(others.max())
    for block in ranking.blocks(queries, len(features)):
        scores = features[block] @ features.T
        scores[torch.arange(len(block)), block] = -torch.inf  # not the image itself
        right = labels[scores.topk(depth, dim=1).indices] == labels[block][:, None]
        wanted = others[block][:, None]
        places = torch.arange(1, depth + 1)
        precision = right.cumsum(dim=1).double() / places
        counted = right & (places <= wanted)
        precisions.append((precision * counted).sum(dim=1) / wanted[:, 0])
        first.append(right[:, 0])
    return SameLabel(queries, torch.cat(first), torch.cat(precisions), others[queries])


def precision_by_chance(right: Tensor, candidates: int) -> tuple[float, float]:
    """The expected precision at 1 and average precision at R of a random order, as means over the queries.

    At place k a right image stands with probability R / M. The k - 1 places before it then hold
    (k - 1) (R - 1) / (M - 1) others on average.

    Args:
        right: number R of right candidates of each query, [Q]. candidates: their number M.
    """
    share = right.double() / candidates
    others = (right.double() - 1) / max(candidates - 1, 1)
    expected = torch.empty_like(share)
    for count in torch.unique(right).tolist():
        rows = right == count
        places = torch.arange(1, count + 1, dtype=torch.float64)
        at_place = (1 + (places[None, :] - 1) * others[rows][:, None]) / places
        expected[rows] = share[rows] * at_place.mean(dim=1)
    return float(share.mean()), float(expected.mean())
