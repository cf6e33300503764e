"""Agreement of clusters with classes, from their table of counts."""

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
"""Samples of each class (row) in each cluster (column)."""


def count_table(labels: NDArray[np.int64], clusters: NDArray[np.int64], shape: tuple[int, int]) -> Counts:
    """The table of counts. Labels and clusters: [N]."""
    flat = np.bincount(labels * shape[1] + clusters, minlength=shape[0] * shape[1])
    return flat.reshape(shape).astype(np.float64)


def v_measure(counts: Counts) -> float:
    """Harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg 2007): the mutual information over the
    mean of both entropies. 1 if there is one class and one cluster."""
    joint = counts / counts.sum()
    by_class, by_cluster = joint.sum(axis=1), joint.sum(axis=0)
    entropies = _entropy(by_class) + _entropy(by_cluster)
    if entropies == 0:
        return 1.0
    information = _entropy(by_class) + _entropy(by_cluster) - _entropy(joint.ravel())
    return float(max(0.0, 2 * information / entropies))


def adjusted_rand(counts: Counts) -> float:
    """Agreement on pairs of samples beyond chance (Hubert and Arabie 1985): 1 is perfect, 0 is expected of clusters
    drawn at random."""
    total = _pairs(np.array(counts.sum()))
    together = _pairs(counts).sum()
    rows, columns = _pairs(counts.sum(axis=1)).sum(), _pairs(counts.sum(axis=0)).sum()
    expected = rows * columns / total if total > 0 else 0.0
    most = (rows + columns) / 2
    return 1.0 if most == expected else float((together - expected) / (most - expected))


def _pairs(counts: Counts) -> Counts:
    return counts * (counts - 1) / 2


def _entropy(shares: Counts) -> float:
    present = shares[shares > 0]
    return float(-(present * np.log(present)).sum())
