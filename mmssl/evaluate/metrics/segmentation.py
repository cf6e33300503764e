"""Segmentation: a class for each pixel, and its overlap with the right one (Everingham et al. 2010, section 4.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_AT_ONCE = 1 << 24
"""Scores of pixels held at a time (64 MiB in float32)."""
HIT, PREDICTED, LABELLED = 0, 1, 2
"""Rows of a table of pixel counts."""


def segment(patches: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """The most similar class of each pixel, int64 [height, width]; similarities lie between those of the patches.

    Args:
        patches: unit vectors, [rows, columns, D].
        weights: unit vectors of the classes, [C, D].
    """
    scores = (patches @ weights.T).permute(2, 0, 1)
    best = torch.full((height, width), -torch.inf)
    found = torch.zeros(height, width, dtype=torch.int64)
    first = 0
    for part in torch.split(scores, max(1, SCORES_AT_ONCE // (height * width))):
        values, classes = F.interpolate(part[None], (height, width), mode="bilinear")[0].max(dim=0)
        found = torch.where(values > best, classes + first, found)
        best = torch.maximum(values, best)
        first += len(part)
    return found


def pixel_counts(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Pixels of each class that are predicted rightly, predicted, and labelled: int64 [3, C].

    Args:
        predictions, labels: int64 [P], of the pixels that count.
    """
    kinds = (predictions[predictions == labels], predictions, labels)
    return torch.stack([torch.bincount(kind, minlength=classes) for kind in kinds])


def intersection_over_union(counts: Tensor) -> Tensor:
    """Of each class the intersection of prediction and label divided by their union, float64 [C]; NaN without either.

    Args:
        counts: of `pixel_counts`, summed over all images.
    """
    hit, predicted, labelled = counts.double()
    overlap: Tensor = hit / (predicted + labelled - hit)
    return overlap


def summarize(counts: Tensor) -> dict[str, float]:
    """Mean over the classes that occur of the intersection over union, and of the accuracy; accuracy of all pixels."""
    hit, _, labelled = counts.double()
    return {
        "mean_iou": float(intersection_over_union(counts).nanmean()),
        "pixel_accuracy": float(hit.sum() / labelled.sum()),
        "mean_class_accuracy": float((hit / labelled)[labelled > 0].mean()),
    }


def baselines(labelled: Tensor) -> dict[str, dict[str, float]]:
    """The metrics of the most frequent class everywhere, and of classes drawn with their frequencies.

    A class of share p, drawn independently of the label, overlaps p^2 of the pixels and covers 2 p - p^2 of them.

    Args:
        labelled: pixels of each class, int64 [C].
    """
    shares = labelled[labelled > 0].double() / labelled.sum()
    top, even = float(shares.max()), 1 / len(shares)
    return {
        "mean_iou": {"majority": top * even, "chance": float((shares / (2 - shares)).mean())},
        "pixel_accuracy": {"majority": top, "chance": float(shares.square().sum())},
        "mean_class_accuracy": {"majority": even, "chance": even},
    }
