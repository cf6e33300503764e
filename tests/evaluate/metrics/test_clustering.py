"""Agreement of clusters and classes against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from mmssl.evaluate.metrics import clustering
from mmssl.rng import generator


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 80), st.integers(1, 6), st.integers(1, 6), st.floats(0, 1))
def test_they_are_scikit_learns(seed: int, count: int, classes: int, clusters: int, noise: float) -> None:
    """V-measure, which is the normalised mutual information with the arithmetic mean, and the adjusted Rand index are
    scikit-learn's for any number of classes and clusters, also one of each."""
    rng = generator(seed, "clusters")
    labels = rng.integers(0, classes, count)
    found = np.where(rng.random(count) < noise, rng.integers(0, clusters, count), labels % clusters)
    counts = clustering.count_table(labels, found, (classes, clusters))
    assert counts.sum() == count
    assert clustering.v_measure(counts) == pytest.approx(oracle.v_measure_score(labels, found), abs=1e-9)
    assert clustering.v_measure(counts) == pytest.approx(oracle.normalized_mutual_info_score(labels, found), abs=1e-9)
    assert clustering.adjusted_rand(counts) == pytest.approx(oracle.adjusted_rand_score(labels, found), abs=1e-9)
