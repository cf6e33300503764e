"""Calibration: probabilities that are right as often as they say, and thresholds with a stated coverage."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCALES = (1e-2, 1e4)
"""Bounds of the factor from similarities to logits. Classes without any error would have an infinite one."""
CURVES = (-16.0, 16.0)
"""Bounds of the curve of `fit_curve`."""
CURVE_SPREAD = 2.0
"""Standard deviation of the curve expected beforehand: few samples leave it near 0."""
_HALVINGS, _ROUGH_HALVINGS = 50, 14
_GOLDEN_STEPS = 16
_NEWTON_STEPS = 100


@dataclass(frozen=True)
class Sigmoid:
    """The probability sigmoid(scale * score + bias)."""

    scale: float
    bias: float

    def __call__(self, scores: Tensor) -> Tensor:
        """Probabilities of scores, float64 of the same shape."""
        return torch.sigmoid(self.scale * scores.double() + self.bias)


def fit_sigmoid(scores: Tensor, right: Tensor, weights: Tensor | None = None) -> Sigmoid:
    """The sigmoid under which the outcomes are most likely, with the targets of Platt (1999).

    The targets (n + 1) / (n + 2) and 1 / (m + 2) for n right and m wrong scores keep the scale finite where a threshold
    separates them. Newton's method with halved steps (Lin, Lin and Weng 2007).

    Args:
        scores: [N]. right: bool [N], with both values among them.
        weights: of the outcomes, [N]. None: 1 each.
    """
    x, truth = scores.double(), right.double()
    w = torch.ones_like(x) if weights is None else weights.double()
    positives, negatives = (w * truth).sum(), (w * (1 - truth)).sum()
    target = torch.where(right, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    centre, width = x.mean(), x.std(correction=0).clamp(min=1e-12)
    rows = torch.stack([(x - centre) / width, torch.ones_like(x)], dim=1)

    def loss(at: Tensor) -> Tensor:
        logits = rows @ at
        return (w * (torch.nn.functional.softplus(logits) - target * logits)).sum()

    found = torch.tensor([0.0, float(((positives + 1) / (negatives + 1)).log())], dtype=torch.float64)
    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(rows @ found)
        slope = rows.T @ (w * (p - target))
        # The small diagonal keeps equal scores from making the matrix singular.
        curve = rows.T @ ((w * p * (1 - p))[:, None] * rows) + 1e-10 * torch.eye(2, dtype=torch.float64)
        step, size = torch.linalg.solve(curve, slope), 1.0
        # The last steps change the loss by less than its rounding.
        most = loss(found) * (1 + 1e-14) + 1e-14
        while size > 1e-10 and not bool(loss(found - size * step) <= most):
            size /= 2
        found = found - size * step
        if float((size * step).abs().max()) < 1e-10:
            break
    scale = float(found[0] / width)
    return Sigmoid(scale, float(found[1]) - scale * float(centre))


def fit_scale(similarities: Tensor, labels: Tensor, halvings: int = _HALVINGS) -> float:
    """The factor from similarities to logits under which the labels are most likely: temperature scaling, whose
    temperature is 1 over it (Guo et al. 2017). Bisection: the slope of the loss rises with the factor.

    Args:
        similarities: [N, C]. labels: int64 [N]. halvings: of the interval of the logarithm of the factor.
    """
    rows = similarities.double()
    own = rows.gather(1, labels[:, None])[:, 0].mean()
    low, high = (math.log(bound) for bound in SCALES)
    for _ in range(halvings):
        middle = (low + high) / 2
        expected = ((math.exp(middle) * rows).softmax(dim=1) * rows).sum(dim=1).mean()
        low, high = (middle, high) if expected < own else (low, middle)
    return math.exp((low + high) / 2)


def bend(similarities: Tensor, curve: float) -> Tensor:
    """(exp(curve * s) - 1) / curve of each similarity s: steeper at high ones if the curve is positive.

    It rises with s, so that the order of the labels stays. A curve of 0 changes nothing.
    """
    return similarities if curve == 0 else torch.expm1(curve * similarities) / curve


def fit_curve(similarities: Tensor, labels: Tensor) -> tuple[float, float]:
    """The factor and the curve under which the labels are most likely with the logits factor * bend(s, curve).

    Temperature scaling, which is the curve 0, supposes that a difference of similarities means the same everywhere.
    Where some images are recognised and others are not, it means more at high similarities. Golden-section search in
    the curve, with the likeliest factor for each.

    Args:
        similarities: [N, C]. labels: int64 [N].
    """

    def loss(curve: float) -> float:
        rows = bend(similarities.double(), curve)
        logits = fit_scale(rows, labels, _ROUGH_HALVINGS) * rows
        beforehand = (curve / CURVE_SPREAD) ** 2 / 2
        return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")) + beforehand

    ratio = (math.sqrt(5) - 1) / 2
    low, high = CURVES
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(_GOLDEN_STEPS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    curve = (low + high) / 2
    return fit_scale(bend(similarities.double(), curve), labels), curve


def familiarity(similarities: Tensor, scale: float) -> Tensor:
    """Closeness of each image to its best labels: the soft maximum log(mean(exp(scale * s))) / scale, float64 [N].

    Times -scale it is the energy of Liu et al. (2020). The mean in place of their sum makes it independent of the
    number of labels: each is as likely beforehand as the number says.

    Args:
        similarities: [N, C].
    """
    rows = scale * similarities.double()
    return (rows.logsumexp(dim=1) - math.log(rows.shape[1])) / scale


def conformal_threshold(scores: Tensor, coverage: float) -> float:
    """The largest threshold that a further score reaches with probability `coverage` or more (split conformal
    prediction, Papadopoulos et al. 2002): the k-th smallest score with k = floor((N + 1) (1 - coverage)).

    It holds if the further sample is drawn as these were. -inf if there are too few scores for the coverage.

    Args:
        scores: [N]. coverage: between 0 and 1.
    """
    # The small number undoes the rounding of 1 - 0.9.
    place = math.floor((len(scores) + 1) * (1 - coverage) + 1e-9)
    return float(scores.double().sort().values[place - 1]) if place >= 1 else -math.inf
