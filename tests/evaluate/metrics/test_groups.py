"""Accuracies by group against SciPy and loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mmssl.errors import UserError
from mmssl.evaluate.metrics.groups import group_accuracies, group_rows, widest_gap
from mmssl.rng import generator
from mmssl.stats import wilson
from mmssl.types import Sample


def sample(**fields: object) -> Sample:
    return Sample(id=0, shard="0.tar", key="0", image=b"", fields=dict(fields))


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_is_scipys(samples: int, share: float) -> None:
    """The score interval is SciPy's."""
    hits = round(share * samples)
    expected = stats.binomtest(hits, samples).proportion_ci(0.95, method="wilson")
    assert wilson(hits, samples) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_slices_are_means_by_group() -> None:
    """Each group's accuracy is the mean over its samples; the worst comes first; sizes add up."""
    rng = generator(1)
    correct, groups = rng.random(100) < 0.5, [f"g{i}" for i in rng.integers(0, 5, 100)]
    found = group_accuracies(correct, groups)
    for s in found:
        inside = [c for c, g in zip(correct, groups, strict=True) if g == s.group]
        assert (s.samples, s.accuracy) == (len(inside), pytest.approx(np.mean(inside)))
        assert s.interval[0] <= s.accuracy <= s.interval[1]
    assert [s.accuracy for s in found] == sorted(s.accuracy for s in found)
    assert sum(s.samples for s in found) == 100


def test_a_gap_is_real_or_chance() -> None:
    """Groups that differ by construction have a small p-value, random ones not; tiny ones are left out."""
    rng = generator(2)
    groups = ["a"] * 100 + ["b"] * 100 + ["tiny"] * 3
    differ = np.concatenate([rng.random(100) < 0.8, rng.random(100) < 0.3, np.zeros(3, bool)])
    gap = widest_gap(differ, groups)
    assert gap is not None
    assert (gap.best, gap.worst) == ("a", "b")
    assert gap.width == pytest.approx(differ[:100].mean() - differ[100:200].mean())
    assert gap.p_value < 0.01
    alike = widest_gap(rng.random(203) < 0.5, groups)
    assert alike is not None
    assert alike.p_value > 0.05
    assert widest_gap(differ[100:], groups[100:]) is None


def test_the_p_value_of_a_gap_is_uniform_without_one() -> None:
    """Where groups make no difference, a tenth of the p-values is below 0.1."""
    groups = ["a", "b", "c"] * 40
    below = [g.p_value < 0.1 for i in range(100) if (g := widest_gap(generator(4, i).random(120) < 0.5, groups))]
    assert 0.02 <= np.mean(below) <= 0.2


def test_the_p_value_is_that_of_shuffled_samples() -> None:
    """Urns give what shuffling right and wrong among the samples one by one gives; small groups take their share."""
    groups = ["a"] * 30 + ["b"] * 25 + ["c"] * 20 + ["tiny"] * 9
    right = generator(5).random(84) < np.where(np.arange(84) < 30, 0.65, 0.45)
    gap = widest_gap(right, groups)
    assert gap is not None
    rng, widths = generator(6), []
    for _ in range(4000):
        shuffled = rng.permutation(right)
        rates = [shuffled[:30].mean(), shuffled[30:55].mean(), shuffled[55:75].mean()]
        widths.append(max(rates) - min(rates))
    assert gap.p_value == pytest.approx(np.mean(np.array(widths) >= gap.width - 1e-12), abs=0.03)


def test_names_of_groups_may_be_long() -> None:
    """A group's name takes memory once, however many samples there are; names that differ in their end only differ."""
    groups = ["x" * 100_000 + "\0"] * 10 + ["x" * 100_000] * 10 + [f"g{i % 40}" for i in range(40_000)]
    found = group_accuracies(np.arange(40_020) < 10, groups)
    assert len(found) == 42
    gap = widest_gap(np.arange(40_020) < 10, groups)
    assert gap is not None
    assert (gap.best, gap.width) == ("x" * 100_000 + "\0", 1.0)


def test_groups_come_from_metadata() -> None:
    """Values become text, a missing one is a group of its own; unknown fields and lists are refused."""
    assert group_rows([sample(style="x"), sample(style=3), sample(), sample(style=" ")], "style") == [
        "x",
        "3",
        "(none)",
        "(none)",
    ]
    with pytest.raises(UserError, match=r"no sample of 0\.tar has a field 'size' .* fields are style, txt"):
        group_rows([sample(style="x"), sample(txt="a")], "size")
    with pytest.raises(UserError, match="'tags' holds lists"):
        group_rows([sample(tags=["x"])], "tags")
