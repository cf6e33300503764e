"""The embedding as a map of two dimensions."""

import importlib
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Points = NDArray[np.float64]


def plane(features: Tensor) -> tuple[Points, str]:
    """Positions in 0..1 [N, 2] of unit vectors [N, D], and how they were found: t-SNE where scikit-learn is installed
    and there are enough points for it, else the two main directions."""
    perplexity = min(30, (len(features) - 1) // 3)
    if perplexity < 5:
        return _scaled(main_directions(features)), "PCA"
    try:
        manifold = importlib.import_module("sklearn.manifold")
    except ImportError:
        return _scaled(main_directions(features)), "PCA (with scikit-learn installed it is t-SNE)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = manifold.TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=0).fit_transform(
            features.numpy()
        )
    return _scaled(np.asarray(found, dtype=np.float64)), "t-SNE"


def main_directions(features: Tensor) -> Points:
    """Coordinates along the two directions of the largest variance, [N, 2]."""
    centred = (features - features.mean(0)).double()
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    found: Points = (centred @ directions.T).numpy()
    return found if found.shape[1] == 2 else np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def _scaled(points: Points) -> Points:
    low, high = points.min(0), points.max(0)
    scaled: Points = (points - low) / np.maximum(high - low, 1e-12)
    return scaled
