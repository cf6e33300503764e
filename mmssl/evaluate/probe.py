"""Logistic regression on frozen features, regularised as validation data say (Radford et al. 2021, A.3)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.evaluate.metrics import share
from mmssl.rng import generator

COARSE = tuple(10.0**e for e in range(-6, 7, 2))
"""The 7 first values of C."""
FINEST = 1 / 8
"""Last step of the search, in powers of ten."""
SHOTS = (1, 2, 4, 8, 16)
ITERATIONS = 1000


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
    """The classifier to which all is alike."""
    return Linear(torch.zeros(classes, width, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64))


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    c: float,
    start: Linear | None = None,
    centre: Linear | None = None,
) -> Linear:
    """Minimise |W - W0|^2 / 2 + c * (sum of cross entropies), with W0 = 0 scikit-learn's LogisticRegression.

    Args:
        features: [N, D]. labels: int64 [N].
        c: inverse strength of the regularisation; the bias is not regularised.
        start: where to begin; the minimum is the same from everywhere.
        centre: the classifier with the weights W0 that c = 0 leaves. None: zeros.
    """
    x, targets, n = features.double(), F.one_hot(labels, classes).double(), len(features)
    mean = x.mean(dim=0)
    axes, stretch = _conditioning(x - mean, classes, c)
    z = (x - mean) @ axes * stretch
    # The change from the centre is what is fitted, on top of the centre's logits.
    centre = zeros(classes, x.shape[1]) if centre is None else centre
    given = x @ centre.weights.T + centre.bias
    change = zeros(classes, x.shape[1]) if start is None else start.plus(centre, -1)
    v, bias = change.weights @ axes / stretch, change.bias + change.weights @ mean
    solver = torch.optim.LBFGS(
        [v, bias],
        max_iter=ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        # Divided by c * n, so that the tolerances mean the same for every c and size.
        log_p = (given + F.linear(z, v, bias)).log_softmax(dim=1)
        error = (log_p.exp() - targets) / n
        v.grad = error.T @ z + v * stretch.square() / (c * n)
        bias.grad = error.sum(dim=0)
        return -(log_p * targets).sum() / n + (v * stretch).square().sum() / (2 * c * n)

    solver.step(objective)  # type: ignore[no-untyped-call]
    weights = (v * stretch) @ axes.T
    return centre.plus(Linear(weights, bias - weights @ mean))


def _conditioning(centred: Tensor, classes: int, c: float) -> tuple[Tensor, Tensor]:
    """Axes [D, R] and their stretch [R], so that in V, where W = (V * stretch) axes^T, the problem is nearly round.

    That changes the solver's path, not the minimum, which lies in the span of the axes: the principal ones of the
    centred features [N, D], R = min(N, D), each stretched to a curvature of 1 at W = 0.
    """
    n = len(centred)
    if n < centred.shape[1]:
        _, values, rows = torch.linalg.svd(centred, full_matrices=False)
        variance, axes = values.square() / n, rows.T
    else:
        variance, axes = torch.linalg.eigh(centred.T @ centred / n)
    curvature = variance.clamp(min=0) * (1 - 1 / classes) / classes + 1 / (c * n)
    return axes, curvature.rsqrt()


def choose_c(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int, centre: Linear | None = None
) -> float:
    """The C with the best validation accuracy: 7 values from 1e-6 to 1e6, then halving steps around the best.

    Both are features [N, D] and labels [N]. Of equal ones the smallest C wins: the classifier nearest to the centre.
    """
    accuracy: dict[float, float] = {}
    fitted: Linear | None = None

    def measure(exponent: float) -> None:
        nonlocal fitted
        if exponent not in accuracy:
            fitted = fit(*train, classes, 10.0**exponent, start=fitted, centre=centre)
            accuracy[exponent] = share(fitted.scores(validation[0]).argmax(1) == validation[1])

    for c in COARSE:
        measure(float(np.log10(c)))
    step = 1.0
    while step >= FINEST:
        peak = _best(accuracy)
        for exponent in (peak - step, peak + step):
            measure(exponent)
        step /= 2
    return math.pow(10, _best(accuracy))


def hold_out(labels: Tensor, part: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and to validate on, drawn at random in each class, which keeps one to train on."""
    rng = generator(seed, "hold out")
    train, validation = [], []
    for label in np.unique(labels.numpy()).tolist():
        rows = rng.permutation((labels == label).nonzero().flatten().numpy())
        held = min(round(part * len(rows)), len(rows) - 1)
        validation.append(rows[:held])
        train.append(rows[held:])
    return _sorted(train), _sorted(validation)


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
) -> tuple[Linear, float]:
    """Choose C with the given training and validation rows, then fit: the classifier and its C.

    Args:
        rows: which to train on and which to validate on. Without any to validate on, C is 1.
        refit: fit on both in the end, else on the training rows alone.
        centre: the classifier that the weights are drawn to. None: zeros.
    """
    train, validation = rows
    if len(validation) == 0:
        return fit(features[train], labels[train], classes, 1.0, centre=centre), 1.0
    shown, held_out = (features[train], labels[train]), (features[validation], labels[validation])
    c = choose_c(shown, held_out, classes, centre)
    chosen = torch.cat(rows) if refit else train
    return fit(features[chosen], labels[chosen], classes, c, centre=centre), c


def _best(accuracy: dict[float, float]) -> float:
    return min(accuracy, key=lambda exponent: (-accuracy[exponent], exponent))


def _sorted(parts: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> Tensor:
    return torch.from_numpy(np.sort(np.concatenate(parts)))
