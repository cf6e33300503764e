"""How sure a figure is: bootstrap intervals over the samples it was measured on (Efron 1979, percentiles).

Student's t distribution for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
"""

import math
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

    What is resampled must be independent: where several rows belong to one image, images are the samples.

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


def central_probability(t: float, degrees: int) -> float:
    """Probability that |T| < t, for t >= 0 and at least one degree of freedom."""
    return _central(math.atan(t / math.sqrt(degrees)), degrees)


def quantile(level: float, degrees: int) -> float:
    """The t with probability `level` (0 to 1) that |T| < t, by bisection."""
    low, high = 0.0, math.pi / 2
    # As many halvings as a float has bits.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, degrees) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _central(angle: float, degrees: int) -> float:
    """The probability in the angle atan(t / sqrt(degrees)), where it is a finite series."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
