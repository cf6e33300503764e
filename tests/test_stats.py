"""Intervals and tests against SciPy, and intervals against the coverage that they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mmssl.rng import generator
from mmssl.stats import Rows, bootstrap, means, over_draws, paired_t, t_central_probability, t_quantile

FLOATS = st.floats(-1, 1).map(lambda x: round(x, 4))


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


def test_classes_of_unequal_sizes_are_resampled_each_by_itself() -> None:
    """Every resample has as many samples of each class as the data; the interval of the mean recall is that of SciPy's
    bootstrap of the classes, as independent samples. Equal sizes change nothing."""
    rng = generator(9)
    strata = rng.permutation(np.repeat([0, 1, 2], [60, 12, 3]))
    right = rng.random(75) < np.array([0.5, 0.8, 0.6])[strata]

    def recall(rows: Rows) -> dict[str, float]:
        assert np.bincount(strata[rows]).tolist() == [60, 12, 3]
        return {"recall": float(np.mean([right[rows][strata[rows] == c].mean() for c in range(3)]))}

    found = bootstrap(recall, 75, resamples=4000, strata=strata)["recall"]
    expected = stats.bootstrap(
        [right[strata == c].astype(float) for c in range(3)],
        lambda *parts, axis: np.mean([part.mean(axis=axis) for part in parts], axis=0),
        method="percentile",
        n_resamples=4000,
        rng=generator(2),
    )
    assert found == pytest.approx(expected.confidence_interval, abs=0.02)
    equal = np.repeat([0, 1, 2], 25)

    def mean(rows: Rows) -> dict[str, float]:
        return {"m": float(right[rows].mean())}

    assert bootstrap(mean, 75, strata=equal) == bootstrap(mean, 75)


@pytest.mark.parametrize("samples", [1, 10, 100])
@pytest.mark.parametrize("right", [True, False])
def test_samples_that_all_agree_leave_room_for_others(samples: int, right: bool) -> None:
    """Where all samples are right, or none, the interval is SciPy's of Wilson and no point. A metric that is no
    fraction keeps its point."""
    exact = stats.binomtest(samples if right else 0, samples).proportion_ci(method="wilson")
    intervals = means({"acc1": np.full(samples, float(right)), "rank": np.full(samples, 7.0)})[1]
    assert intervals["acc1"] == pytest.approx((exact.low, exact.high))
    assert intervals["rank"] == (7.0, 7.0)


def test_classes_that_are_right_as_a_whole_leave_room_too() -> None:
    """With classes of unequal sizes, each all right or all wrong, every resample by class agrees; the interval is
    Wilson's of the whole."""
    classes = np.repeat([0, 1, 2], [20, 14, 6])
    exact = stats.binomtest(26, 40).proportion_ci(method="wilson")
    assert means({"acc1": (classes != 1).astype(float)}, classes)[1]["acc1"] == pytest.approx((exact.low, exact.high))


def test_an_interval_over_draws_covers_other_draws() -> None:
    """Where accuracies differ from draw to draw, the interval over samples and draws covers the accuracy of all draws
    in 95 % of experiments, and that over samples alone in fewer than 70 %."""
    covered, alone, rounds = 0, 0, 300
    for seed in range(rounds):
        rng = generator("over draws", seed)
        rates = np.clip(rng.normal(0.5, 0.1, 5), 0, 1)
        outcomes = [(rng.random(150) < rate).astype(float) for rate in rates]
        narrow = means({"x": np.mean(outcomes, 0)})[1]["x"]
        low, high = over_draws(narrow, [float(draw.mean()) for draw in outcomes], (0, 1))
        covered += low <= 0.5 <= high
        alone += narrow[0] <= 0.5 <= narrow[1]
    assert covered / rounds >= 0.93
    assert alone / rounds < 0.7
    assert over_draws((0.1, 0.3), [0.2]) == (0.1, 0.3)
    assert over_draws((0.9, 1.0), [0.9, 1.0, 1.0], (0, 1))[1] == 1


def test_tiny_classes_keep_their_spread() -> None:
    """With about one sample per class the interval is the binomial one; resampling within classes gives a point."""
    strata = np.array([*range(70), 0, 1, 2, 3, 4])
    right = np.arange(75) % 5 == 0

    def mean(rows: Rows) -> dict[str, float]:
        return {"mean": float(right[rows].mean())}

    low, high = bootstrap(mean, 75, resamples=4000, strata=strata)["mean"]
    assert (low, high) == pytest.approx(tuple(stats.binom(75, 0.2).ppf([0.025, 0.975]) / 75), abs=0.02)


def test_the_same_seed_gives_the_same_interval() -> None:
    """Intervals are a function of data and seed; resamples in which a figure has no value are left out."""
    values = np.array([np.nan, 1.0, 2.0])

    def middle(rows: Rows) -> dict[str, float]:
        return {"first": float(values[rows[0]])}

    assert bootstrap(middle, 3, seed=5) == bootstrap(middle, 3, seed=5)
    assert bootstrap(middle, 3) == {"first": (1.0, 2.0)}


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 101])
def test_student_agrees_with_scipy(degrees: int) -> None:
    """Probabilities and quantiles for odd and even degrees of freedom."""
    t = np.linspace(0, 12, 50)
    ours = [t_central_probability(float(x), degrees) for x in t]
    np.testing.assert_allclose(ours, 1 - 2 * stats.t.sf(t, degrees), atol=1e-12)
    for level in (0.5, 0.9, 0.95, 0.99):
        assert t_quantile(level, degrees) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-9)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=2, max_size=8))
def test_paired_t_agrees_with_ttest_rel(pairs: list[tuple[float, float]]) -> None:
    """Mean, interval and p-value of stats.ttest_rel."""
    first, second = np.array(pairs).T
    change = second - first
    if np.ptp(change) < 1e-9:
        return
    ours, theirs = paired_t(change.tolist()), stats.ttest_rel(second, first)
    assert ours.mean == pytest.approx(change.mean())
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=1e-9)
    assert ours.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-7, abs=1e-12)


def test_alike_differences_have_a_point_as_interval() -> None:
    """No spread: equal runs differ by 0 for sure, runs that all gain the same gain that."""
    assert paired_t([0.0, 0.0]).p_value == 1
    gained = paired_t([0.25, 0.25, 0.25])
    assert (gained.interval, gained.p_value) == ((0.25, 0.25), 0)
