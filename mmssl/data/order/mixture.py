"""Sources in exact proportions."""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_MAX_PATTERN = 4096


class Mixture:
    """Which source each depth of a lane reads: a pattern of T slots, repeated, with exact shares in every
    lane.

    Lane l begins at slot l mod T, so that also one row across the lanes is close to the shares.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        quotas = _quotas(weights)
        centres = [((slot + 0.5) / quota, source) for source, quota in enumerate(quotas) for slot in range(quota)]
        self.pattern = np.array([source for _, source in sorted(centres)], dtype=np.int64)
        is_source = self.pattern[None] == np.arange(len(quotas))[:, None]
        self._before = np.concatenate([np.zeros((len(quotas), 1), np.int64), np.cumsum(is_source, axis=1)], axis=1)

    def count(self, source: int, lane: int, depth: int) -> int:
        """How often `source` is read in the first `depth` depths of a lane."""
        shift = lane % len(self.pattern)
        return self._prefix(source, depth + shift) - self._prefix(source, shift)

    def sources(self, lane: int, start: int, stop: int) -> Ints:
        """The source at each depth of [start, stop)."""
        return self.pattern[(np.arange(start, stop) + lane) % len(self.pattern)]

    def _prefix(self, source: int, slots: int) -> int:
        rounds, rest = divmod(slots, len(self.pattern))
        return rounds * int(self._before[source, -1]) + int(self._before[source, rest])


def _quotas(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the weights; the nearest of sum 4,096 where the exact ones are
    larger."""
    # By way of its digits: 0.3 is 3/10, not the nearest binary fraction.
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    length = lcm(*(share.denominator for share in shares))
    if length <= _MAX_PATTERN:
        return [int(share * length) for share in shares]
    quotas = [max(1, int(share * _MAX_PATTERN)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i] * _MAX_PATTERN)
    for source in by_remainder[: max(0, _MAX_PATTERN - sum(quotas))]:
        quotas[source] += 1
    return quotas
