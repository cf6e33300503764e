"""Two models on the same samples: which differences are real."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmssl.evaluate.interval import Interval, bootstrap
from mmssl.rng import generator

Values = NDArray[np.float64]
PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Difference:
    """How much better the second model is in the mean of a per-sample value."""

    first: float
    second: float
    interval: Interval
    """Of second - first, from a bootstrap of the paired samples."""
    p_value: float
    """Probability of a difference at least as large if the two models were alike."""

    @property
    def difference(self) -> float:
        """second - first."""
        return self.second - self.first


def compare(first: Values, second: Values, seed: int = 0) -> Difference:
    """Compare per-sample values (right or wrong, reciprocal ranks ...) of two models, paired by place, [N]
    each.

    Values that are all 0 or 1 are tested exactly (McNemar), others by flipping the differences' signs at
    random."""
    assert first.shape == second.shape
    change = second - first
    interval = bootstrap(lambda rows: {"mean": float(change[rows].mean())}, len(change), seed=seed)["mean"]
    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    p_value = mcnemar(int((change > 0).sum()), int((change < 0).sum())) if binary else sign_flip(change, seed)
    return Difference(float(first.mean()), float(second.mean()), interval, p_value)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value: of equal models each changed sample is gained or lost with probability 1/2."""
    changed = gained + lost
    if gained == lost:
        return 1.0
    terms = [_log_choose(changed, k) - changed * math.log(2) for k in range(min(gained, lost) + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in terms))


def sign_flip(change: Values, seed: int = 0, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p-value of the mean if each difference is as likely to have the other sign, [N]."""
    rng = generator(seed, "sign flip")
    observed = abs(change.sum())
    extreme = 1
    for _ in range(permutations):
        signs = rng.integers(0, 2, len(change)) * 2 - 1
        # Sums in another order differ in the last bits; equal ones must count.
        extreme += int(abs((signs * change).sum()) >= observed * (1 - 1e-12))
    return extreme / (permutations + 1)


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which differences are real, with a chance of any false alarm of at most `level` (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    real = [False] * len(p_values)
    for place, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - place):
            break
        real[index] = True
    return real


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
