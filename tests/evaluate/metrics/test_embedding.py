"""The geometry of an embedding against loops and closed forms."""

import math

import numpy as np
import pytest
import torch

from mmssl.evaluate.metrics import embedding as geometry
from mmssl.rng import generator


def unit(*words: int, rows: int, width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(generator(*words).normal(size=(rows, width))), dim=1)


def test_alignment_and_gap_are_loops() -> None:
    """Alignment is the mean squared distance of pairs, the gap the distance of the means."""
    x, y = unit(1, rows=9, width=4), unit(2, rows=9, width=4)
    expected = np.mean([float(((a - b) ** 2).sum()) for a, b in zip(x, y, strict=True)])
    assert geometry.alignment(x, y) == pytest.approx(expected)
    assert geometry.alignment(x, x) == 0.0
    assert geometry.modality_gap(x, y) == pytest.approx(math.dist(x.mean(0).tolist(), y.mean(0).tolist()))


def test_uniformity_is_a_loop_over_pairs() -> None:
    """Uniformity is torch's pdist formula of the paper, and that of the cube's corners in closed form."""
    x = unit(3, rows=50, width=6)
    expected = torch.pdist(x).square().mul(-2).exp().mean().log()
    assert geometry.uniformity(x) == pytest.approx(float(expected), abs=1e-9)
    same = torch.ones(4, 1)
    assert geometry.uniformity(same) == pytest.approx(0.0, abs=1e-9)
    opposite = torch.tensor([[1.0], [-1.0]])
    assert geometry.uniformity(opposite) == pytest.approx(-8.0)


def test_uniformity_of_many_rows_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of the rows gives nearly what all rows give, in blocks or not."""
    x = unit(4, rows=600, width=3)
    whole = geometry.uniformity(x)
    monkeypatch.setattr(geometry, "_ROWS_PER_BLOCK", 7)
    assert geometry.uniformity(x) == pytest.approx(whole, abs=1e-9)
    monkeypatch.setattr(geometry, "UNIFORMITY_ROWS", 300)
    assert geometry.uniformity(x) == pytest.approx(whole, abs=0.1)
    assert geometry.uniformity(x) != whole


def test_effective_rank() -> None:
    """Equal directions count fully, one as one, and the entropy of NumPy's singular values agrees."""
    assert geometry.effective_rank(torch.eye(5)) == pytest.approx(5.0)
    assert geometry.effective_rank(torch.ones(7, 5)) == pytest.approx(1.0, abs=1e-5)
    x = unit(5, rows=30, width=8)
    values = np.linalg.svd(x.numpy(), compute_uv=False)
    shares = values / values.sum()
    assert geometry.effective_rank(x) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
