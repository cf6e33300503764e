"""Intervals and tests: bootstrap, proportions, paired comparisons, Student's t, and Holm's correction."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.rng import generator

Rows = NDArray[np.int64]
"""Indices of samples, drawn with replacement."""
Interval = tuple[float, float]

RESAMPLES = 1000
LEVEL = 0.95
CLASS_SIZE = 10
"""Samples per class, on average, from which classes are resampled each by itself: with n samples the variance that a
class shows by itself is too small by 1/n."""


def bootstrap(
    metrics: Callable[[Rows], Mapping[str, float]],
    samples: int,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    strata: NDArray[np.int64] | None = None,
    fractions: Mapping[str, float] | None = None,
) -> dict[str, Interval]:
    """The percentile interval (Efron 1979) of each metric that `metrics` computes from a choice of samples.

    Samples must be independent: where several rows belong to one image, the images are the samples.

    Args:
        metrics: maps `samples` indices in [0, samples) to metrics by name, NaN where undefined.
        samples: number of samples, at least 1.
        level: probability that the interval covers the metric of the population.
        strata: the class of each sample, [N]. Classes of unequal sizes are resampled each by itself, so that no
            resample lacks a rare one. None, equal sizes, or fewer than CLASS_SIZE samples per class: all samples
            together, as a class of one sample has no spread of its own.
        fractions: metrics that are means of values from 0 to 1, each with its number of samples. Where all values, or
            all of each class, are equal, every resample agrees; then the interval is `wilson`'s in place of a point.
    """
    assert not fractions or level == LEVEL
    rng = generator(seed, "bootstrap")
    draw = _draw_all(samples, rng) if strata is None or not _resampled_apart(strata) else _draw_by_class(strata, rng)
    drawn = [metrics(draw()) for _ in range(resamples)]
    tails = ((1 - level) / 2, (1 + level) / 2)
    found = {name: _quantiles(np.array([d[name] for d in drawn]), tails) for name in drawn[0]}
    for name, count in (fractions or {}).items():
        if is_point(found[name]):
            found[name] = wilson(found[name][0] * count, count)
    return found


def is_point(interval: Interval) -> bool:
    """True for an interval without width, but for rounding."""
    return interval[1] - interval[0] < 1e-12


def _resampled_apart(strata: NDArray[np.int64]) -> bool:
    """True if classes differ in size and have enough samples to be resampled each by itself."""
    sizes = np.unique(strata, return_counts=True)[1]
    return len(np.unique(sizes)) > 1 and float(sizes.mean()) >= CLASS_SIZE


def _draw_all(samples: int, rng: np.random.Generator) -> Callable[[], Rows]:
    return lambda: rng.integers(0, samples, samples)


def _draw_by_class(strata: NDArray[np.int64], rng: np.random.Generator) -> Callable[[], Rows]:
    """As many rows of each class as it has."""
    order = np.argsort(strata, kind="stable")
    _, starts, counts = np.unique(strata[order], return_index=True, return_counts=True)
    start, count = np.repeat(starts, counts), np.repeat(counts, counts)
    return lambda: order[start + rng.integers(0, count)]


def means(
    values: Mapping[str, NDArray[Any]], strata: NDArray[np.int64] | None = None
) -> tuple[dict[str, float], dict[str, Interval]]:
    """The mean of each metric over the samples, [N] each, and its interval.

    Args:
        strata: as for `bootstrap`.
    """
    samples = len(next(iter(values.values())))

    def measure(rows: Rows) -> dict[str, float]:
        return {name: float(column[rows].mean()) for name, column in values.items()}

    fractions = {name: samples for name, column in values.items() if column.min() >= 0 and column.max() <= 1}
    return measure(np.arange(samples)), bootstrap(measure, samples, strata=strata, fractions=fractions)


def _quantiles(values: NDArray[np.float64], tails: tuple[float, float]) -> Interval:
    low, high = np.nanquantile(values, tails)
    return float(low), float(high)


def t_central_probability(t: float, degrees: int) -> float:
    """Probability that |T| < t, for t >= 0 and at least one degree of freedom."""
    return _central(math.atan(t / math.sqrt(degrees)), degrees)


def t_quantile(level: float, degrees: int) -> float:
    """The t with probability `level` (0 to 1) that |T| < t, by bisection.

    Student's distribution as in Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    # One halving for each bit of a float.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, degrees) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _central(angle: float, degrees: int) -> float:
    """The probability as a finite series in the angle atan(t / sqrt(degrees))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


_Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def wilson(hits: float, samples: float) -> Interval:
    """95 % score interval of a proportion (Wilson 1927), which has a width even at 0 and 1. samples >= 1."""
    share = hits / samples
    middle = (share + _Z**2 / (2 * samples)) / (1 + _Z**2 / samples)
    half = _Z / (1 + _Z**2 / samples) * math.sqrt(share * (1 - share) / samples + _Z**2 / (4 * samples**2))
    # Exact at the ends, where the sums round.
    return (max(0.0, middle - half) if hits else 0.0), (min(1.0, middle + half) if hits < samples else 1.0)


def newcombe(first: tuple[float, float], second: tuple[float, float]) -> Interval:
    """95 % interval of the difference of two independent proportions (Newcombe 1998, method 10), given as hits and
    samples."""
    p, q = first[0] / first[1], second[0] / second[1]
    (low1, high1), (low2, high2) = wilson(*first), wilson(*second)
    return p - q - math.hypot(p - low1, high2 - q), p - q + math.hypot(high1 - p, q - low2)


PERMUTATIONS = 10_000


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value: of equal models each changed sample is gained or lost with probability 1/2."""
    changed = gained + lost
    if gained == lost:
        return 1.0
    terms = [_log_choose(changed, k) - changed * math.log(2) for k in range(min(gained, lost) + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in terms))


def sign_flip(change: NDArray[np.float64], seed: int = 0, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p-value of the mean if each difference is as likely to have the other sign, [N]."""
    rng = generator(seed, "sign flip")
    observed = abs(change.sum())
    extreme = 1
    for _ in range(permutations):
        signs = rng.integers(0, 2, len(change)) * 2 - 1
        # Sums in different orders differ in the last bits; equal ones must count.
        extreme += int(abs((signs * change).sum()) >= observed * (1 - 1e-12))
    return extreme / (permutations + 1)


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """True for significant differences, with a probability of any false alarm of at most `level` (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    real = [False] * len(p_values)
    for place, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - place):
            break
        real[index] = True
    return real


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@dataclass(frozen=True)
class Paired:
    """Mean of paired differences with its Student-t interval and the two-sided p-value of a zero mean."""

    mean: float
    interval: Interval
    p_value: float


def paired_t(differences: Sequence[float], level: float = LEVEL) -> Paired:
    """Student's t for at least two paired differences.

    Where all differences are equal, the interval is a point.
    """
    values = np.array(differences, dtype=np.float64)
    degrees = len(values) - 1
    assert degrees >= 1
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return Paired(mean, (mean, mean), float(mean == 0))
    half = t_quantile(level, degrees) * error
    return Paired(mean, (mean - half, mean + half), 1 - t_central_probability(abs(mean) / error, degrees))


def over_draws(interval: Interval, draws: Sequence[float], limits: Interval = (-1.0, 1.0)) -> Interval:
    """The interval of a mean over draws of training samples, for other test samples and for other draws.

    The distances of the mean from both intervals, that over the samples and Student's over the draws, add as squares
    (Zou and Donner 2008). One draw tells nothing about others, and the interval stays as it is.

    Args:
        interval: over the test samples.
        draws: the value of each draw.
        limits: least and greatest possible value.
    """
    if len(draws) < 2:
        return interval
    found = paired_t(draws)
    low, high = (
        math.hypot(found.mean - mine, found.mean - over) for mine, over in zip(interval, found.interval, strict=True)
    )
    return max(limits[0], found.mean - low), min(limits[1], found.mean + high)
