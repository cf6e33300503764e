"""The shape of the embedding space: closeness of pairs, use of the sphere, distance of the two modalities."""

import math

import torch
from torch import Tensor

from mmssl.rng import generator

UNIFORMITY_ROWS = 5_000
"""Rows, drawn at random, whose pairs uniformity is measured on."""
_ROWS_PER_BLOCK = 1024


def geometry(images: Tensor, texts: Tensor) -> dict[str, float]:
    """All metrics of this module for pairs of unit vectors, [N, D] each, N >= 2."""
    return {
        "alignment": alignment(images, texts),
        "image_uniformity": uniformity(images),
        "text_uniformity": uniformity(texts),
        "modality_gap": modality_gap(images, texts),
        "image_effective_rank": effective_rank(images),
        "text_effective_rank": effective_rank(texts),
    }


def alignment(images: Tensor, texts: Tensor) -> float:
    """Mean squared distance of the pairs; 0 is best (Wang & Isola 2020, alpha = 2). [N, D] each."""
    return float((images - texts).double().square().sum(1).mean())


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|^2) over pairs of different rows; lower is more even (Wang & Isola 2020).

    Args:
        features: unit vectors, [N, D], N >= 2. More than `UNIFORMITY_ROWS` are sampled.
    """
    if len(features) > UNIFORMITY_ROWS:
        chosen = generator(0, "uniformity").choice(len(features), UNIFORMITY_ROWS, replace=False)
        features = features[torch.from_numpy(chosen)]
    rows = features.double()
    squares = rows.square().sum(1)
    n, total = len(rows), 0.0
    for start in range(0, n, _ROWS_PER_BLOCK):
        stop = start + _ROWS_PER_BLOCK
        distances = squares[start:stop, None] + squares - 2 * rows[start:stop] @ rows.T
        # A row has distance 0 to itself and so adds exp(0) = 1, which is subtracted below.
        total += float((-t * distances).exp().sum())
    return math.log((total - n) / (n * (n - 1)))


def modality_gap(images: Tensor, texts: Tensor) -> float:
    """Distance between the mean image and the mean text (Liang et al. 2022). [N, D], [M, D]."""
    return float((images.double().mean(0) - texts.double().mean(0)).norm())


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalized singular values: 1 to D directions in use (Roy & Vetterli 2007). [N, D].

    The singular values are those of the features as they are, without centring.
    """
    squares = torch.linalg.eigvalsh(features.double().T @ features.double()).clamp(min=0)
    shares = squares.sqrt() / squares.sqrt().sum()
    return math.exp(float(torch.special.entr(shares).sum()))
