"""Metrics against scikit-learn, loops and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle
from sklearn.calibration import calibration_curve

from mmssl.evaluate.metrics import ranking as metrics


def predictions_and_labels(seed: int, samples: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random class indices; every predicted class also occurs as a label (scikit-learn warns otherwise)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(0, classes, (samples,), generator=g)])
    predictions = torch.where(
        torch.rand(len(labels), generator=g) < 0.5,
        labels,
        torch.randint(0, classes, labels.shape, generator=g),
    )
    return predictions, labels


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 9))
def test_recalls_equal_scikit_learn(seed: int, samples: int, classes: int) -> None:
    """Mean per-class recall, per-class recall and precision, and the confusion matrix are scikit-learn's."""
    predictions, labels = predictions_and_labels(seed, samples, classes)
    expected = oracle.balanced_accuracy_score(labels, predictions)
    assert metrics.mean_per_class_recall(predictions, labels) == pytest.approx(expected, abs=1e-12)
    matrix = oracle.confusion_matrix(labels, predictions, labels=range(classes))
    assert metrics.confusion_matrix(predictions, labels, classes).tolist() == matrix.tolist()
    names = [f"class {i}" for i in range(classes)]
    recall = oracle.recall_score(labels, predictions, average=None, labels=range(classes))
    precision = oracle.precision_score(labels, predictions, average=None, labels=range(classes), zero_division=np.nan)
    for row, r, p in zip(metrics.per_class(predictions, labels, names), recall, precision, strict=True):
        assert row.recall == pytest.approx(r)
        assert (row.precision is None) == np.isnan(p)
        assert row.precision is None or row.precision == pytest.approx(p)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(5, 12))
def test_top_k_accuracy_equals_scikit_learn(seed: int, classes: int) -> None:
    """Top-1 and top-5 accuracy are scikit-learn's on scores without ties."""
    g = torch.Generator().manual_seed(seed)
    features, weights = torch.randn(40, 8, generator=g), torch.randn(classes, 8, generator=g)
    labels = torch.randint(0, classes, (40,), generator=g)
    found = metrics.top_k(features, weights, 5)
    for k in (1, 5) if classes > 5 else (1,):
        expected = oracle.top_k_accuracy_score(labels, features @ weights.T, k=k, labels=range(classes))
        assert metrics.top_k_accuracy(found.best, labels, k) == pytest.approx(expected, abs=1e-12)
    assert torch.equal(found.first, found.best[:, 0])


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-k, confidence and rankings are the same when the scores are made a few rows at a time."""
    g = torch.Generator().manual_seed(1)
    features, weights = torch.randn(33, 4, generator=g).double(), torch.randn(7, 4, generator=g).double()
    group = torch.randint(0, 7, (33,), generator=g)

    def everything() -> list[torch.Tensor]:
        found = metrics.top_k(features, weights, 5)
        ranking = metrics.rank(features, weights, group, torch.arange(7), 3)
        confidence = metrics.confidence(features, weights, 10.0)
        return [found.scores, found.best, found.first, ranking.ranks, ranking.places, confidence]

    whole = everything()
    monkeypatch.setattr(metrics, "SCORES_PER_BLOCK", 20)
    for a, b in zip(whole, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_class_without_samples_counts_nowhere() -> None:
    """The mean over classes leaves out classes without samples; their table row has no recall."""
    labels, predictions = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2])
    assert metrics.mean_per_class_recall(predictions, labels) == pytest.approx((0.5 + 1.0) / 2)
    row = metrics.per_class(predictions, labels, ["a", "b", "c", "d"])[3]
    assert (row.samples, row.recall, row.precision) == (0, None, None)


def test_most_confused_pairs_come_first() -> None:
    """Wrong pairs are counted like the off-diagonal of the confusion matrix, most frequent first."""
    predictions, labels = predictions_and_labels(3, 200, 6)
    found = metrics.most_confused(predictions, labels)
    matrix = oracle.confusion_matrix(labels, predictions)
    np.fill_diagonal(matrix, 0)
    assert sum(c.count for c in found) == matrix.sum()
    assert all(matrix[c.label, c.prediction] == c.count for c in found)
    assert [c.count for c in found] == sorted((int(n) for n in matrix.ravel() if n), reverse=True)
    assert metrics.most_confused(predictions, labels, limit=2) == found[:2]
    assert metrics.most_confused(labels, labels) == []


def test_calibration_error_by_hand() -> None:
    """Two bins: |0.5 - 0.6| on two samples and |1 - 0.9| on two give 0.1; a sure and right model has none."""
    confidence = torch.tensor([0.6, 0.6, 0.9, 0.9], dtype=torch.float64)
    correct = torch.tensor([True, False, True, True])
    assert metrics.expected_calibration_error(confidence, correct) == pytest.approx(0.1)
    assert metrics.expected_calibration_error(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0.0


def test_calibration_error_of_random_confidences_is_a_loop_over_bins() -> None:
    """The error is the loop of Guo et al. over bins (m-1)/M < p <= m/M."""
    g = torch.Generator().manual_seed(2)
    confidence = torch.rand(500, generator=g)
    correct = torch.rand(500, generator=g) < confidence**2
    expected = 0.0
    for m in range(10):
        inside = (confidence.double() > m / 10) & (confidence.double() <= (m + 1) / 10)
        if inside.any():
            gap = correct[inside].double().mean() - confidence[inside].double().mean()
            expected += float(gap.abs()) * int(inside.sum()) / 500
    assert metrics.expected_calibration_error(confidence, correct, bins=10) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bins", [4, 15])
def test_reliability_is_scikit_learns_calibration_curve(bins: int) -> None:
    """Accuracy and mean confidence of each bin are scikit-learn's; their weighted gaps are the calibration error."""
    g = torch.Generator().manual_seed(5)
    confidence = torch.rand(300, generator=g).double()
    correct = torch.rand(300, generator=g) < confidence.sqrt()
    found = metrics.reliability(confidence, correct, bins)
    accuracy, sure = calibration_curve(correct.numpy(), confidence.numpy(), n_bins=bins)
    np.testing.assert_allclose([b.accuracy for b in found], accuracy, atol=1e-12)
    np.testing.assert_allclose([b.confidence for b in found], sure, atol=1e-12)
    assert sum(b.samples for b in found) == 300
    error = sum(abs(b.accuracy - b.confidence) * b.samples for b in found) / 300
    assert metrics.expected_calibration_error(confidence, correct, bins) == pytest.approx(error, abs=1e-12)


def test_average_precision_equals_scikit_learn() -> None:
    """Each class's average precision is scikit-learn's; a class without positives has none."""
    g = torch.Generator().manual_seed(4)
    scores = torch.randn(50, 6, generator=g)
    targets = (torch.rand(50, 6, generator=g) < 0.3).long()
    targets[0] = 1
    found = metrics.average_precision(scores, targets)
    for c in range(6):
        assert float(found[c]) == pytest.approx(oracle.average_precision_score(targets[:, c], scores[:, c]), abs=1e-6)
    targets[:, 2] = 0
    assert metrics.average_precision(scores, targets)[2].isnan()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 20))
def test_ranks_are_those_of_a_loop(seed: int, groups: int, extra: int) -> None:
    """Hits, average precision and the rank of the best right candidate are what sorting by hand gives."""
    g = torch.Generator().manual_seed(seed)
    of_candidate = torch.cat([torch.arange(groups), torch.randint(0, groups, (extra,), generator=g)])
    of_query = torch.randint(0, groups, (9,), generator=g)
    queries = torch.randn(9, 5, generator=g).double()
    candidates = torch.randn(len(of_candidate), 5, generator=g).double()
    ks = [k for k in (1, 2, 5) if k <= len(candidates)]
    found = metrics.rank(queries, candidates, of_query, of_candidate, ks[-1])
    for q in range(9):
        scored = sorted(range(len(candidates)), key=lambda i: -float(queries[q] @ candidates[i]))
        first = next(place for place, i in enumerate(scored, start=1) if of_candidate[i] == of_query[q])
        assert float(found.ranks[q]) == first
        assert [bool(found.hits(k)[q]) for k in ks] == [first <= k for k in ks]
        assert int(found.places[q]) == (first if first <= ks[-1] else 0)
        listed = [int(of_candidate[i] == of_query[q]) for i in scored[: ks[-1]]]
        precision = sum(sum(listed[: i + 1]) / (i + 1) for i, right in enumerate(listed) if right)
        possible = min(ks[-1], int((of_candidate == of_query[q]).sum()))
        assert float(found.average_precision[q]) == pytest.approx(precision / possible)


def test_equal_scores_share_their_ranks() -> None:
    """A model that gives every candidate the same score ranks the right one in the middle, not first."""
    ones = torch.ones(5, 3)
    found = metrics.rank(ones, ones, torch.arange(5), torch.arange(5), 1)
    assert found.ranks.tolist() == [3.0] * 5


def test_share() -> None:
    """True values as a fraction of all."""
    assert metrics.share(torch.tensor([True, False, True, True])) == 0.75
