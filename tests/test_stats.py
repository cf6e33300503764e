"""Bootstrap intervals against SciPy and against what they promise."""

import numpy as np
import pytest
from scipy import stats

from mmssl.rng import generator
from mmssl.stats import Rows, bootstrap


def test_interval_is_scipys() -> None:
    """The percentile interval of a mean is SciPy's, up to the noise of the resampling."""
    values = generator(1).exponential(size=80)
    found = bootstrap(lambda rows: {"mean": float(values[rows].mean())}, 80, resamples=10_000)["mean"]
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=generator(2))
    assert found == pytest.approx(expected.confidence_interval, abs=0.02)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """An 80 % interval of an accuracy covers the true one in about 80 % of experiments."""
    covered = 0
    for experiment in range(200):
        right = generator(3, experiment).random(100) < 0.7

        def accuracy(rows: Rows, right: np.ndarray = right) -> dict[str, float]:
            return {"acc": float(right[rows].mean())}

        low, high = bootstrap(accuracy, 100, resamples=200, level=0.8)["acc"]
        covered += low <= 0.7 <= high
    assert 0.72 <= covered / 200 <= 0.88


def test_the_same_seed_gives_the_same_interval() -> None:
    """Intervals are a function of data and seed; resamples in which a figure has no value are left out."""
    values = np.array([np.nan, 1.0, 2.0])

    def middle(rows: Rows) -> dict[str, float]:
        return {"first": float(values[rows[0]])}

    assert bootstrap(middle, 3, seed=5) == bootstrap(middle, 3, seed=5)
    assert bootstrap(middle, 3) == {"first": (1.0, 2.0)}
