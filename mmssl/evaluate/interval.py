"""How sure a figure is: bootstrap intervals over the samples it was measured on (Efron 1979, percentiles)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.rng import generator

Rows = NDArray[np.int64]
"""Indices of samples, drawn with replacement."""
Interval = tuple[float, float]

RESAMPLES = 1000
LEVEL = 0.95


def bootstrap(
    figures: Callable[[Rows], Mapping[str, float]],
    samples: int,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Interval]:
    """The interval of each figure that `figures` computes from a choice of samples.

    What is resampled must be independent: where several rows belong to one picture, pictures are the samples.

    Args:
        figures: indices in [0, samples), as many as there are samples -> figure by name, NaN where there is none.
        samples: how many there are, at least 1.
        level: probability that the interval covers the figure of the population.
    """
    rng = generator(seed, "bootstrap")
    drawn = [figures(rng.integers(0, samples, samples)) for _ in range(resamples)]
    tails = ((1 - level) / 2, (1 + level) / 2)
    return {name: _quantiles(np.array([d[name] for d in drawn]), tails) for name in drawn[0]}


def means(values: Mapping[str, NDArray[Any]]) -> tuple[dict[str, float], dict[str, Interval]]:
    """The mean of each figure's values of the samples, [N] each, and its interval."""
    samples = len(next(iter(values.values())))

    def figures(rows: Rows) -> dict[str, float]:
        return {name: float(of_sample[rows].mean()) for name, of_sample in values.items()}

    return figures(np.arange(samples)), bootstrap(figures, samples)


def _quantiles(values: NDArray[np.float64], tails: tuple[float, float]) -> Interval:
    low, high = np.nanquantile(values, tails)
    return float(low), float(high)
