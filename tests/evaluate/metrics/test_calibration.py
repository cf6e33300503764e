"""Sigmoids, temperatures and thresholds against scikit-learn, closed forms and simulations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from mmssl.evaluate.metrics import calibration
from mmssl.rng import generator


def outcomes(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of two classes whose normal distributions overlap, and the class of each; both occur."""
    rng = generator(seed, "outcomes")
    right = torch.from_numpy(rng.random(count) < 0.4)
    right[:2] = torch.tensor([True, False])
    return torch.from_numpy(0.2 + 0.05 * rng.normal(size=count)) + 0.08 * right, right


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(20, 200))
def test_the_sigmoid_is_the_likeliest(seed: int, count: int) -> None:
    """At the fit the gradient of Platt's loss, computed by autograd with his targets, is 0 in both parameters: the loss
    is convex, so no other sigmoid is likelier."""
    scores, right = outcomes(seed, count)
    found = calibration.fit_sigmoid(scores, right)
    positives, negatives = right.double().sum(), (~right).double().sum()
    target = torch.where(right, (positives + 1) / (positives + 2), 1 / (negatives + 2)).double()
    at = torch.tensor([found.scale, found.bias], dtype=torch.float64, requires_grad=True)
    torch.nn.functional.binary_cross_entropy(torch.sigmoid(at[0] * scores + at[1]), target, reduction="sum").backward()
    assert at.grad is not None
    assert float(at.grad.abs().max()) < 1e-6


@pytest.mark.filterwarnings("ignore:Since FrozenEstimator does not appear")
def test_the_sigmoid_is_scikit_learns() -> None:
    """The probabilities are those of scikit-learn's CalibratedClassifierCV with the method `sigmoid`, which is Platt's,
    with weights of the outcomes too."""
    scores, right = outcomes(3, 400)
    weights = torch.where(right, 1.0, 0.25)
    inner = LogisticRegression().fit(scores.numpy()[:, None], right.numpy())
    raw = torch.from_numpy(inner.decision_function(scores.numpy()[:, None]))
    for weight in (None, weights):
        theirs = CalibratedClassifierCV(FrozenEstimator(inner), method="sigmoid", cv=2, ensemble=False)
        theirs.fit(scores.numpy()[:, None], right.numpy(), sample_weight=None if weight is None else weight.numpy())
        expected = theirs.predict_proba(scores.numpy()[:, None])[:, 1]
        ours = calibration.fit_sigmoid(raw, right, weight)(raw)
        np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4)


def test_the_sigmoid_of_normal_scores_is_the_posterior() -> None:
    """Of scores from two normal distributions of equal width, the fit approaches the posterior, which is a sigmoid with
    scale (m1 - m0) / s^2 and bias (m0^2 - m1^2) / 2 s^2."""
    rng, m0, m1, s = generator(0, "normal"), 0.1, 0.25, 0.05
    scores = torch.from_numpy(np.concatenate([rng.normal(m1, s, 100_000), rng.normal(m0, s, 100_000)]))
    found = calibration.fit_sigmoid(scores, torch.arange(200_000) < 100_000)
    assert found.scale == pytest.approx((m1 - m0) / s**2, rel=0.02)
    assert found.bias == pytest.approx((m0**2 - m1**2) / (2 * s**2), rel=0.02)


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_scores_without_overlap_or_difference_have_a_finite_sigmoid(gap: float) -> None:
    """Where a threshold separates the outcomes, or all scores are equal, the fit is finite; equal scores give the
    frequency of the right ones."""
    right = torch.tensor([True] * 30 + [False] * 10)
    found = calibration.fit_sigmoid(gap * right.double(), right)
    assert math.isfinite(found.scale)
    assert math.isfinite(found.bias)
    if gap == 0:
        # The mean of Platt's targets.
        assert float(found(torch.zeros(1))) == pytest.approx((30 * 31 / 32 + 10 / 12) / 40, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(3, 60))
def test_the_scale_is_the_likeliest(seed: int, classes: int, true: float) -> None:
    """No factor on a fine grid gives the labels a lower cross-entropy, as torch computes it."""
    rng = generator(seed, "scale")
    similarities = torch.from_numpy(rng.uniform(-1, 1, (150, classes)) * 0.2)
    labels = torch.multinomial((true * similarities).softmax(1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    found = calibration.fit_scale(similarities, labels)
    grid = [found, *np.geomspace(*calibration.SCALES, 400).tolist()]
    losses = [float(torch.nn.functional.cross_entropy(scale * similarities, labels)) for scale in grid]
    assert losses[0] <= min(losses) + 1e-9


def test_the_scale_is_recovered() -> None:
    """Of labels drawn from softmax(30 s) the fitted factor is 30."""
    similarities = torch.rand(40_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
    labels = torch.multinomial((30 * similarities).softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    assert calibration.fit_scale(similarities, labels) == pytest.approx(30, rel=0.03)


@pytest.mark.parametrize("curve", [-2.0, 0.0, 3.0])
def test_the_curve_is_recovered_and_the_likeliest(curve: float) -> None:
    """Of labels drawn from softmax(20 (exp(c s) - 1) / c), computed here, the fitted logits have the same slope at low
    and at high similarities, and no curve on a grid, with its likeliest factor, has a lower cross-entropy."""
    g = torch.Generator().manual_seed(0)
    similarities = torch.rand(20_000, 8, generator=g, dtype=torch.float64) * 0.6 - 0.1
    true = 20 * (similarities if curve == 0 else ((curve * similarities).exp() - 1) / curve)
    labels = torch.multinomial(true.softmax(1), 1, generator=g)[:, 0]
    scale, found = calibration.fit_curve(similarities, labels)
    for at in (0.0, 0.25, 0.5):
        assert scale * math.exp(found * at) == pytest.approx(20 * math.exp(curve * at), rel=0.1), at

    def loss(scale: float, bent: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(scale * bent, labels))

    for other in np.linspace(-7, 7, 15):
        bent = torch.from_numpy(np.expm1(other * similarities.numpy()) / other if other else similarities.numpy())
        assert loss(scale, calibration.bend(similarities, found)) <= loss(calibration.fit_scale(bent, labels), bent)


def test_few_samples_have_little_curve() -> None:
    """On 50 images whose labels follow temperature scaling, the curve stays within 2 standard deviations of what is
    expected beforehand, and the order of the labels is that of the similarities whatever the curve."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        similarities = 0.15 + 0.06 * torch.randn(50, 20, generator=g, dtype=torch.float64)
        labels = torch.multinomial((30 * similarities).softmax(1), 1, generator=g)[:, 0]
        scale, curve = calibration.fit_curve(similarities, labels)
        assert abs(curve) < 4
        assert bool((calibration.bend(similarities, curve).argsort(1) == similarities.argsort(1)).all())
        assert scale > 0


def test_familiarity_is_a_soft_maximum() -> None:
    """It is the loop's log-mean-exp, lies between mean and maximum, and does not change when all labels are doubled."""
    similarities = torch.tensor([[0.1, 0.3, 0.2], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = calibration.familiarity(similarities, 20.0)
    expected = [math.log(sum(math.exp(20 * s) for s in row) / 3) / 20 for row in similarities.tolist()]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert bool((found >= similarities.mean(1) - 1e-12).all())
    assert bool((found <= similarities.amax(1) + 1e-12).all())
    np.testing.assert_allclose(calibration.familiarity(similarities.repeat(1, 2), 20.0).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("count", "coverage"), [(99, 0.9), (50, 0.9), (39, 0.95), (30, 0.5)])
def test_thresholds_cover_as_stated(count: int, coverage: float) -> None:
    """Over 4,000 simulated sets of scores, a further score reaches the threshold with probability 1 - k / (N + 1),
    k = floor((N + 1) (1 - coverage)), the closed form for uniform scores; it is the coverage or more."""
    rng = generator(0, "scores")
    thresholds = [calibration.conformal_threshold(torch.from_numpy(rng.random(count)), coverage) for _ in range(4000)]
    k = math.floor((count + 1) * (1 - coverage) + 1e-9)
    expected = 1 - k / (count + 1)
    assert expected >= coverage - 1e-12
    error = math.sqrt(expected * (1 - expected) / (count + 2) / len(thresholds))  # of the mean of Beta variables
    assert 1 - np.mean(thresholds) == pytest.approx(expected, abs=4 * error)


def test_too_few_scores_exclude_nothing() -> None:
    """Of 8 scores no threshold covers 90 %: it is minus infinity. Of 9 it is the smallest."""
    scores = torch.arange(9.0)
    assert calibration.conformal_threshold(scores[:8], 0.9) == -math.inf
    assert calibration.conformal_threshold(scores, 0.9) == 0.0
