"""Logistic regression on frozen features, its regularisation chosen on validation data (Radford et al. 2021, A.3)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.evaluate.metrics.ranking import share
from mmssl.rng import generator

COARSE = tuple(10.0**e for e in range(-6, 7, 2))
"""The first 7 values of C."""
FINEST = 1 / 8
"""Last step of the search, in powers of ten."""
UNEVEN = 4
"""Ratio of the largest to the smallest number of validation rows of a class from which classes count alike."""
SHOTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Linear:
    """A linear classifier."""

    weights: Tensor
    """[C, D], float64."""
    bias: Tensor
    """[C], float64."""

    def scores(self, features: Tensor) -> Tensor:
        """Logits of features [N, D], float32 [N, C]."""
        return (features.double() @ self.weights.T + self.bias).float()

    def plus(self, other: "Linear", factor: float = 1.0) -> "Linear":
        """The classifier whose logits are this one's plus `factor` times the other's."""
        return Linear(self.weights + factor * other.weights, self.bias + factor * other.bias)


def zeros(classes: int, width: int) -> Linear:
    """A zero-initialised classifier."""
    return Linear(torch.zeros(classes, width, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64))


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    c: float,
    start: Linear | None = None,
    centre: Linear | None = None,
) -> Linear:
    """Minimise |W - W0|^2 / 2 + c * (sum of cross entropies). W0 = 0 is scikit-learn's LogisticRegression.

    Args:
        features: [N, D]. labels: int64 [N].
        c: inverse strength of the regularisation; the bias is not regularised.
        start: the starting point; the minimum does not depend on it.
        centre: the classifier with weights W0, the solution for c = 0. None: zeros.
    """
    return Regression(features, labels, classes, centre).fit(c, EXACT, start)


@dataclass(frozen=True)
class Effort:
    """Stopping criteria of the solver."""

    dtype: torch.dtype
    gradient: float
    """Largest entry of the gradient, of the mean loss in the solver's coordinates."""
    iterations: int


EXACT = Effort(torch.float64, 1e-7, 1000)
ROUGH = Effort(torch.float32, 1e-5, 200)
"""Enough to choose C: at the minimum, one or two of hundreds of validation samples are classified differently."""


class Regression:
    """Logistic regression of some samples for any C."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int, centre: Linear | None = None) -> None:
        """Arguments as for the function `fit`."""
        x = features.double()
        self.classes = classes
        self.centre = zeros(classes, x.shape[1]) if centre is None else centre
        self.targets = F.one_hot(labels, classes).double()
        self.mean = x.mean(dim=0)
        self.axes, self.variance = _principal(x - self.mean)
        self.rows = (x - self.mean) @ self.axes
        # The fit is of the change from the centre, on top of the centre's logits.
        self.given = x @ self.centre.weights.T + self.centre.bias

    def fit(self, c: float, effort: Effort, start: Linear | None = None) -> Linear:
        """The minimum for one C, to the precision that the effort allows.

        The solver works on V, where W = (V * stretch) axes^T: each axis stretched to a curvature of 1 at W = 0, so that
        the problem is well conditioned. That changes the solver's path, not the minimum, which lies in the axes' span.
        """
        n, width = len(self.rows), len(self.mean)
        curvature = self.variance * (1 - 1 / self.classes) / self.classes + 1 / (c * n)
        stretch = curvature.rsqrt()
        change = zeros(self.classes, width) if start is None else start.plus(self.centre, -1)
        z, given, targets, pull = (
            t.to(effort.dtype) for t in (self.rows * stretch, self.given, self.targets, stretch.square() / (c * n))
        )
        v = (change.weights @ self.axes / stretch).to(effort.dtype)
        bias = (change.bias + change.weights @ self.mean).to(effort.dtype)
        solver = torch.optim.LBFGS(
            [v, bias],
            max_iter=effort.iterations,
            tolerance_grad=effort.gradient,
            tolerance_change=1e-10,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            # Divided by c * n, so that the tolerances mean the same for every c and size.
            log_p = (given + F.linear(z, v, bias)).log_softmax(dim=1)
            error = (log_p.exp() - targets) / n
            v.grad = error.T @ z + v * pull
            bias.grad = error.sum(dim=0)
            return -(log_p * targets).sum() / n + (v.square() * pull).sum() / 2

        solver.step(objective)  # type: ignore[no-untyped-call]
        weights = (v.double() * stretch) @ self.axes.T
        return self.centre.plus(Linear(weights, bias.double() - weights @ self.mean))


def _principal(centred: Tensor) -> tuple[Tensor, Tensor]:
    """The principal axes [D, R] of centred features [N, D], R = min(N, D), and the variance along each, [R]."""
    n = len(centred)
    if n < centred.shape[1]:
        _, values, rows = torch.linalg.svd(centred, full_matrices=False)
        return rows.T, values.square() / n
    variance, axes = torch.linalg.eigh(centred.T @ centred / n)
    return axes, variance.clamp(min=0)


def choose_c(
    problem: Regression, validation: tuple[Tensor, Tensor], by_class: bool = False, prior: Tensor | None = None
) -> tuple[float, Linear]:
    """The C with the best validation accuracy: 7 values from 1e-6 to 1e6, then halving steps around the best.

    The smallest of equally good values wins: its classifier is nearest to the centre. Each fit is a rough one that
    starts from the nearest C's.

    Args:
        validation: features [N, D] and labels [N].
        by_class: in place of the accuracy, the log-likelihood, averaged over the samples of each class and then over
            the classes. A few samples of a class tell more by it.
        prior: logarithms of class frequencies, [C], that are taken off the logits before they are judged.
    Returns:
        C, and an approximation of its classifier.
    """
    quality: dict[float, float] = {}
    fitted: dict[float, Linear] = {}

    def measure(exponent: float) -> None:
        if exponent not in quality:
            nearest = min(fitted, key=lambda other: abs(other - exponent), default=None)
            start = None if nearest is None else fitted[nearest]
            fitted[exponent] = problem.fit(10.0**exponent, ROUGH, start)
            scores = fitted[exponent].scores(validation[0])
            scores = scores if prior is None else scores - prior.float()
            good = share(scores.argmax(1) == validation[1])
            quality[exponent] = _likelihood_by_class(scores, validation[1]) if by_class else good

    def best() -> float:
        return min(quality, key=lambda exponent: (-quality[exponent], exponent))

    for c in COARSE:
        measure(float(np.log10(c)))
    step = 1.0
    while step >= FINEST:
        peak = best()
        for exponent in (peak - step, peak + step):
            measure(exponent)
        step /= 2
    return math.pow(10, best()), fitted[best()]


def _likelihood_by_class(scores: Tensor, labels: Tensor) -> float:
    """The mean over classes of the mean log-likelihood of their samples. scores [N, C], labels [N]."""
    found = scores.double().log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    counts = torch.bincount(labels)
    totals = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, labels, found)
    return float((totals[counts > 0] / counts[counts > 0]).mean())


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and to validate on, drawn at random in each class, which keeps one to train on."""
    rng = generator(seed, "hold out")
    train, validation = [], []
    for label in np.unique(labels.numpy()).tolist():
        rows = rng.permutation((labels == label).nonzero().flatten().numpy())
        held = min(round(fraction * len(rows)), len(rows) - 1)
        validation.append(rows[:held])
        train.append(rows[held:])
    return _sorted(train), _sorted(validation)


def available_shots(labels: Tensor) -> list[int]:
    """The numbers of shots, of 1, 2, 4, 8, 16, that every class has."""
    scarcest = int(np.unique(labels.numpy(), return_counts=True)[1].min())
    return [k for k in SHOTS if k <= scarcest]


def draw_shots(labels: Tensor, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """k rows of each class to train on, up to min(k, 4) others to validate on (as Zhou et al. 2022 do)."""
    rng = generator(seed, "shots", shots)
    train, validation = [], []
    for label in np.unique(labels.numpy()).tolist():
        rows = rng.permutation((labels == label).nonzero().flatten().numpy())
        train.append(rows[:shots])
        validation.append(rows[shots : shots + min(shots, 4)])
    return _sorted(train), _sorted(validation)


def probe(
    features: Tensor,
    labels: Tensor,
    rows: tuple[Tensor, Tensor],
    classes: int,
    refit: bool = True,
    centre: Linear | None = None,
    balance: bool = False,
) -> tuple[Linear, float]:
    """Choose C with the given training and validation rows, then fit: the classifier and its C.

    Args:
        rows: training rows and validation rows. Without validation rows, C is 1. Where classes have very unequal
            numbers of validation rows, each class counts alike; those too small to have any are validated on their
            training rows. Otherwise a C that ignores them would win.
        refit: fit on both in the end, else on the training rows alone.
        centre: the classifier the weights are regularised towards. None: zeros.
        balance: treat classes of unequal sizes alike (Menon et al. 2021): the logits are fitted with the logarithms of
            the class frequencies added. The bias is not regularised, so that is the fit without them, less them.
    """
    train, validation = rows
    problem = Regression(features[train], labels[train], classes, centre)
    if len(validation) == 0:
        return _less(problem.fit(1.0, EXACT), log_prior(labels[train], classes) if balance else None), 1.0
    scarce = train[~torch.isin(labels[train], labels[validation])]
    shown = torch.cat([validation, scarce])
    counts = torch.bincount(labels[shown])
    uneven = len(scarce) > 0 or int(counts.max()) >= UNEVEN * int(counts[counts > 0].min())
    prior = log_prior(labels[train], classes) if balance else None
    c, found = choose_c(problem, (features[shown], labels[shown]), uneven or balance, prior)
    if refit:
        train = torch.cat(rows)
        problem = Regression(features[train], labels[train], classes, centre)
    return _less(problem.fit(c, EXACT, found), log_prior(labels[train], classes) if balance else None), c


def log_prior(labels: Tensor, classes: int) -> Tensor:
    """Logarithms of the class frequencies, float64 [C]; a class without samples counts as one sample."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1).double()
    return (counts / counts.sum()).log()


def _less(found: Linear, prior: Tensor | None) -> Linear:
    """A classifier with a prior taken off its logits."""
    return found if prior is None else Linear(found.weights, found.bias - prior)


def _sorted(parts: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> Tensor:
    return torch.from_numpy(np.sort(np.concatenate(parts)))
