"""Metrics of answers that use no image: the most frequent class, chance at the class prior, and a random order."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Baselines = dict[str, dict[str, float]]
"""Metric -> `majority` (always the most frequent class) and `chance` (an answer drawn at random) -> its value."""
WORDS = {"majority": "the most frequent class", "chance": "chance"}


def of_classes(labels: Tensor, metrics: Sequence[str]) -> Baselines:
    """Baselines of accuracies and of the mean per-class recall on N samples, as far as they are among `metrics`.

    `chance` draws a class with its frequency among the samples: it is right with probability sum p^2.

    Args:
        labels: int64 [N].
        metrics: names; `acc1@4`, `acc1_clean` and the like count as `acc1`.
    """
    shares = torch.bincount(labels).double().sort(descending=True).values / len(labels)
    present = int((shares > 0).sum())
    known = {
        "acc1": {"majority": float(shares[0]), "chance": float(shares.square().sum())},
        "acc5": {"majority": float(shares[:5].sum())},
        "mean_per_class_recall": {"chance": 1 / present},
    }
    kinds = {name: name if name in known else re.split("[@_]", name)[0] for name in metrics}
    return {name: known[kind] for name, kind in kinds.items() if kind in known}


def recall_by_chance(right: NDArray[np.int64], candidates: int, k: int) -> float:
    """The expected recall@k of a random order: the mean of 1 - C(M - R, k) / C(M, k) over the queries.

    Args:
        right: number R of right candidates of each query, [Q].
        candidates: their number M. k: at most M.
    """
    missed = np.ones(len(right))
    for place in range(k):
        missed *= np.maximum(candidates - right - place, 0) / (candidates - place)
    return float((1 - missed).mean())


def describe(found: Mapping[str, float]) -> str:
    """Baselines of one metric as text: `majority 0.6000, chance 0.4100`."""
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())


def no_better(value: float, found: Mapping[str, float]) -> str:
    """The words `no better than the most frequent class (60.0 %)` if a value is so; else empty.

    Args:
        value: of a metric for which higher is better.
        found: its baselines.
    """
    best = max(found, key=lambda name: found[name], default=None)
    return "" if best is None or value > found[best] else f"no better than {WORDS[best]} ({100 * found[best]:.1f} %)"
