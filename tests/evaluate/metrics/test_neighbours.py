"""Image retrieval by label against pytorch-metric-learning and enumeration."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch.nn.functional import normalize

from mmssl.evaluate.metrics import neighbours, ranking


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(6, 60), st.integers(1, 6))
def test_it_is_pytorch_metric_learnings(seed: int, count: int, classes: int) -> None:
    """Precision at 1 and mean average precision at R are those of pytorch-metric-learning, with the images among
    themselves and classes of one image left out."""
    g = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(count, 5, generator=g), dim=1)
    labels = torch.randint(0, classes, (count,), generator=g)
    labels[:2] = 0
    found = neighbours.search_same_label(features, labels)
    oracle = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity()),
    )
    expected = oracle.get_accuracy(features, labels)
    assert float(found.first.double().mean()) == pytest.approx(expected["precision_at_1"], abs=1e-6)
    assert float(found.average_precision.mean()) == pytest.approx(expected["mean_average_precision_at_r"], abs=1e-6)
    assert found.queries.tolist() == [row for row in range(count) if int((labels == labels[row]).sum()) > 1]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is the same a few rows at a time."""
    g = torch.Generator().manual_seed(0)
    features, labels = normalize(torch.randn(40, 6, generator=g), dim=1), torch.randint(0, 5, (40,), generator=g)
    whole = neighbours.search_same_label(features, labels)
    monkeypatch.setattr(ranking, "SCORES_PER_BLOCK", 100)
    parts = neighbours.search_same_label(features, labels)
    assert torch.equal(whole.average_precision, parts.average_precision)
    assert torch.equal(whole.first, parts.first)


@pytest.mark.parametrize(("right", "candidates"), [(1, 5), (2, 5), (3, 4), (4, 4)])
def test_chance_is_the_mean_over_all_orders(right: int, candidates: int) -> None:
    """The expected precision at 1 and average precision at R are the means over every order of the candidates."""
    firsts, precisions = [], []
    for places in itertools.combinations(range(candidates), right):
        hits = np.isin(np.arange(candidates), places)
        firsts.append(hits[0])
        precisions.append(sum(hits[: k + 1].mean() for k in range(right) if hits[k]) / right)
    found = neighbours.precision_by_chance(torch.tensor([right, right]), candidates)
    assert found == pytest.approx((np.mean(firsts), np.mean(precisions)))
