"""Classifiers on frozen features against scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from mmssl.evaluate.classifiers import logistic_regression as probe
from mmssl.evaluate.metrics import ranking as metrics
from mmssl.evaluate.tasks import knn
from mmssl.rng import generator


def clusters(seed: int, rows: int = 240, classes: int = 4, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit vectors around class centres that are the same for every seed, and their classes."""
    rng = generator(seed, "clusters")
    centres = generator("centres").normal(size=(classes, 10))
    labels = rng.integers(0, classes, rows)
    x = torch.from_numpy(centres[labels] + noise * rng.normal(size=(rows, 10)))
    return torch.nn.functional.normalize(x, dim=1).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("rows", [240, 8])
@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_fit_is_scikit_learns_logistic_regression(c: float, rows: int) -> None:
    """Weights, and so scores up to a constant, are those of scikit-learn, with more rows than columns or fewer."""
    x, y = clusters(1, rows)
    y[:4] = torch.arange(4)
    ours = probe.fit(x, y, 4, c)
    theirs = LogisticRegression(C=c, max_iter=10_000, tol=1e-10).fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose(ours.weights, theirs.coef_, atol=2e-3 * np.abs(theirs.coef_).max())
    assert ours.scores(x).argmax(1).tolist() == theirs.predict(x.double().numpy()).tolist()


def test_fit_starts_anywhere() -> None:
    """The minimum does not depend on the start."""
    x, y = clusters(2)
    cold = probe.fit(x, y, 4, 1.0)
    warm = probe.fit(x, y, 4, 1.0, start=probe.fit(x, y, 4, 30.0))
    torch.testing.assert_close(cold.weights, warm.weights, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rows", [240, 6])
def test_fit_around_a_centre_is_the_minimum_of_its_objective(rows: int) -> None:
    """At the result the gradient of |W - W0|^2 / 2 + c * cross entropy vanishes, by autograd; as c goes to zero the
    weights are the centre's; around zero it is the fit without a centre."""
    x, y = clusters(9, rows)
    y[:4] = torch.arange(4)
    rng = generator("centre")
    centre = probe.Linear(torch.from_numpy(3 * rng.normal(size=(4, 10))), torch.from_numpy(rng.normal(size=4)))
    found = probe.fit(x, y, 4, 2.0, centre=centre, start=probe.fit(x, y, 4, 0.5))
    weights, bias = found.weights.clone().requires_grad_(), found.bias.clone().requires_grad_()
    error = torch.nn.functional.cross_entropy(x.double() @ weights.T + bias, y, reduction="sum")
    ((weights - centre.weights).square().sum() / 2 + 2.0 * error).backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    assert bias.grad is not None
    assert float(weights.grad.abs().max()) < 1e-2
    assert float(bias.grad.abs().max()) < 1e-2
    torch.testing.assert_close(probe.fit(x, y, 4, 1e-9, centre=centre).weights, centre.weights, atol=1e-4, rtol=0)
    plain, zeros = probe.fit(x, y, 4, 1.0), probe.fit(x, y, 4, 1.0, centre=probe.zeros(4, 10))
    assert torch.equal(plain.weights, zeros.weights)


def test_the_probe_is_exact_although_c_is_chosen_roughly() -> None:
    """What the probe returns for its C is scikit-learn's minimum, also for a C that separates the classes."""
    x, y = clusters(11, rows=160, classes=8, noise=0.6)
    fitted, c = probe.probe(x, y, probe.hold_out(y, 0.2, seed=0), 8)
    theirs = LogisticRegression(C=c, max_iter=10_000, tol=1e-10).fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose(fitted.weights, theirs.coef_, atol=2e-3 * np.abs(theirs.coef_).max())


def test_the_search_for_c_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit the weakly regularised fits of separable classes take thousands of steps; the search takes at
    most 200 for each of its 15 values, in single precision, and starts each at the nearest value fitted before."""
    x, y = clusters(12, rows=96, classes=24, noise=0.3)
    steps: list[int] = []
    kinds: set[torch.dtype] = set()

    class Counting(torch.optim.LBFGS):
        def step(self, closure):  # type: ignore[no-untyped-def]
            loss = super().step(closure)  # type: ignore[no-untyped-call]
            steps.append(self.state[self._params[0]]["n_iter"])  # type: ignore[attr-defined]
            kinds.add(self._params[0].dtype)  # type: ignore[attr-defined]
            return loss

    monkeypatch.setattr(torch.optim, "LBFGS", Counting)
    problem = probe.Regression(x, y, 24)
    probe.choose_c(problem, clusters(13, rows=96, classes=24, noise=0.3))
    assert max(steps) <= 200
    assert len(steps) <= 15
    assert kinds == {torch.float32}
    rough = sum(steps)
    steps.clear()
    for c in probe.COARSE:
        problem.fit(c, probe.EXACT)
    assert rough < sum(steps) / 2


def test_the_chosen_c_is_as_good_as_a_grid() -> None:
    """The search is within one sample of the best of a fine grid; of equal C it takes the small one."""
    train, validation = clusters(3, noise=2.0), clusters(4, rows=120, noise=2.0)

    def right(c: float) -> int:
        return int((probe.fit(*train, 4, c).scores(validation[0]).argmax(1) == validation[1]).sum())

    chosen, found = probe.choose_c(probe.Regression(*train, 4), validation)
    assert int((found.scores(validation[0]).argmax(1) == validation[1]).sum()) >= right(chosen) - 1
    assert right(chosen) >= max(right(10.0**e) for e in np.arange(-4, 4.5, 0.5)) - 1
    train, validation = clusters(5, noise=0.01), clusters(6, noise=0.01)
    easy, _ = probe.choose_c(probe.Regression(*train, 4), validation)
    assert right(easy) == right(1e6) == len(validation[1])
    assert easy < 0.1


def test_classes_of_one_sample_have_a_say_in_the_choice_of_c() -> None:
    """With 60, 5, 1, 1 and 2 samples a class, and a start that knows two classes of five, the probe learns the others,
    as scikit-learn does with C = 100: classes too small to be held out are not given up."""
    middles = F.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = torch.randn(69 + 200, 24, generator=torch.Generator().manual_seed(1)) * 0.08
    y = torch.tensor([0] * 60 + [1] * 5 + [2] + [3] + [4] * 2 + [c for c in range(5) for _ in range(40)])
    x = F.normalize(middles[y] + rows, dim=1)
    wrong = middles[[0, 1, 3, 4, 2]]
    start = probe.Linear(20 * wrong.double(), torch.zeros(5, dtype=torch.float64))
    assert float((start.scores(x[69:]).argmax(1) == y[69:]).double().mean()) == pytest.approx(0.4, abs=0.01)
    fitted, _ = probe.probe(x[:69], y[:69], probe.hold_out(y[:69], 0.2, seed=0), 5, centre=start)
    theirs = LogisticRegression(C=100, max_iter=10_000).fit(x[:69].numpy(), y[:69].numpy())
    ours = float((fitted.scores(x[69:]).argmax(1) == y[69:]).double().mean())
    assert ours >= theirs.score(x[69:].numpy(), y[69:].numpy()) - 0.02 > 0.9


def test_probe_learns_the_clusters() -> None:
    """Trained on one draw, the probe classifies another draw of separable clusters without error."""
    x, y = clusters(7, noise=0.1)
    fitted, _ = probe.probe(x, y, probe.hold_out(y, 0.2, seed=0), 4)
    new, labels = clusters(8, noise=0.1)
    assert torch.equal(fitted.scores(new).argmax(1), labels)


def test_hold_out_splits_every_class() -> None:
    """Each class gives about a fifth, never its last row; nothing is lost or used twice."""
    labels = torch.tensor([0] * 50 + [1] * 10 + [2])
    train, validation = probe.hold_out(labels, 0.2, seed=1)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(61))
    assert torch.bincount(labels[validation], minlength=3).tolist() == [10, 2, 0]


@pytest.mark.parametrize("shots", probe.SHOTS)
def test_shots_are_k_of_each_class(shots: int) -> None:
    """k rows of each class to train on, up to 4 others to validate on, other ones for another seed."""
    labels = torch.arange(60) % 3
    train, validation = probe.draw_shots(labels, shots, seed=0)
    assert torch.bincount(labels[train]).tolist() == [shots] * 3
    assert torch.bincount(labels[validation]).tolist() == [min(shots, 4)] * 3
    assert not set(train.tolist()) & set(validation.tolist())
    assert train.tolist() != probe.draw_shots(labels, shots, seed=1)[0].tolist()


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_is_scikit_learns(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted votes give scikit-learn's class probabilities, in blocks or not."""
    x, y = clusters(9)
    new, _ = clusters(10, rows=50)

    def weights(distances: np.ndarray) -> np.ndarray:
        # On the unit sphere |a - b|^2 = 2 - 2 a.b
        return np.exp((1 - distances**2 / 2) / knn.TEMPERATURE)

    theirs = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(x.double().numpy(), y.numpy())
    ours = knn.knn_scores(new, x, y, 4, k=k)
    np.testing.assert_allclose(ours / ours.sum(1, keepdim=True), theirs.predict_proba(new.double().numpy()), atol=1e-4)
    monkeypatch.setattr(metrics, "SCORES_PER_BLOCK", 1000)
    torch.testing.assert_close(knn.knn_scores(new, x, y, 4, k=k), ours)
