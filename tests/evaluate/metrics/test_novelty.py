"""Detection of the unknown against scikit-learn and loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mmssl.evaluate.metrics import novelty


def scores(seed: int, known: int, unknown: int, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of known and unknown samples; with ties they take a few values."""
    g = torch.Generator().manual_seed(seed)
    found = torch.randn(known, generator=g) + 0.7, torch.randn(unknown, generator=g)
    return tuple(part.round() if ties else part for part in found)  # type: ignore[return-value]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 50), st.integers(1, 50), st.booleans())
def test_auroc_is_scikit_learns(seed: int, known: int, unknown: int, ties: bool) -> None:
    """The area under the ROC curve is scikit-learn's, with equal scores too."""
    a, b = scores(seed, known, unknown, ties)
    truth = np.concatenate([np.ones(known), np.zeros(unknown)])
    assert novelty.auroc(a, b) == pytest.approx(roc_auc_score(truth, torch.cat([a, b]).numpy()), abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 50), st.integers(1, 50), st.booleans(), st.sampled_from([0.5, 0.95, 1.0]))
def test_false_positives_are_those_of_the_best_threshold(
    seed: int, known: int, unknown: int, ties: bool, recall: float
) -> None:
    """Among all thresholds that pass the wanted fraction of known samples, tried in a loop, the fewest unknown ones
    pass."""
    a, b = scores(seed, known, unknown, ties)
    rates = [
        float((b >= t).double().mean()) for t in a.tolist() if float((a >= t).sum()) >= math.ceil(recall * known - 1e-9)
    ]
    assert novelty.fpr_at(a, b, recall) == pytest.approx(min(rates))
