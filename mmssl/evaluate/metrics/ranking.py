"""Metrics of classifications and searches, as pure functions of tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmssl.evaluate.metrics.calibration import bend

SCORES_PER_BLOCK = 1 << 24
"""Similarities held at a time (64 MiB in float32)."""


@dataclass(frozen=True)
class ClassRow:
    """One class of the per-class table; rates without a denominator are None."""

    name: str
    samples: int
    """Samples with this label."""
    recall: float | None
    """Recall: fraction of its samples that are predicted as this class."""
    precision: float | None
    """Precision: fraction of its predictions that are correct."""


@dataclass(frozen=True)
class Confusion:
    """The number of samples of one class that were predicted as another."""

    label: int
    prediction: int
    count: int


@dataclass(frozen=True)
class CalibrationBin:
    """The predictions whose probability is in (low, high]."""

    low: float
    high: float
    samples: int
    confidence: float
    """Their mean probability."""
    accuracy: float
    """Fraction of them that are right."""


@dataclass(frozen=True)
class Outcome:
    """The best classes of each row."""

    scores: Tensor
    """Similarities, best first, [N, k]."""
    best: Tensor
    """Class indices, best first, equals in the order of `torch.topk`, int64 [N, k]."""
    first: Tensor
    """The predicted class, the lowest index among equals (`argmax`), int64 [N]."""


def top_k(features: Tensor, weights: Tensor, k: int) -> Outcome:
    """The k best classes of each row by dot product; only a block of the logits exists at a time.

    Equal scores are treated as in clip_benchmark: accuracies come from `topk` and predictions from `argmax`.

    Args:
        features: [N, D], N >= 1.
        weights: class vectors [C, D], C >= k.
    """
    parts = [best_classes(block @ weights.T, k) for block in blocks(features, len(weights))]
    scores, best, first = zip(*((part.scores, part.best, part.first) for part in parts), strict=True)
    return Outcome(torch.cat(scores), torch.cat(best), torch.cat(first))


def best_classes(scores: Tensor, k: int) -> Outcome:
    """The k best classes of each row of scores [N, C], as `top_k` finds them."""
    found = scores.topk(k, dim=1)
    return Outcome(found.values, found.indices, scores.argmax(dim=1))


def confidence(features: Tensor, weights: Tensor, logit_scale: float, logit_curve: float = 0.0) -> Tensor:
    """The probability of the most probable class: the maximum of softmax(logit_scale * similarity), [N].

    Args:
        logit_curve: of calibrated logits, see `calibration.bend`.
    """
    parts = (block @ weights.T for block in blocks(features, len(weights)))
    return torch.cat([(logit_scale * bend(part, logit_curve)).softmax(dim=1).amax(dim=1) for part in parts])


def top_k_accuracy(best: Tensor, labels: Tensor, k: int) -> float:
    """Fraction of rows whose label is among their first k predictions.

    Args:
        best: class indices, best first, [N, >= k], N >= 1.
        labels: [N].
    """
    assert best.shape[1] >= k
    return share(best[:, :k].eq(labels[:, None]).any(dim=1))


def mean_per_class_recall(predictions: Tensor, labels: Tensor) -> float:
    """The mean recall of the classes that have samples (scikit-learn's balanced accuracy). Both [N]."""
    classes = int(labels.max()) + 1
    samples = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[predictions == labels], minlength=classes)
    seen = samples > 0
    return float((hits[seen].double() / samples[seen]).mean())


def per_class(predictions: Tensor, labels: Tensor, names: Sequence[str]) -> list[ClassRow]:
    """One row per class, in the order of `names`. Predictions and labels: [N]."""
    samples = torch.bincount(labels, minlength=len(names)).tolist()
    predicted = torch.bincount(predictions, minlength=len(names)).tolist()
    hits = torch.bincount(labels[predictions == labels], minlength=len(names)).tolist()
    return [
        ClassRow(name, n, hit / n if n else None, hit / p if p else None)
        for name, n, p, hit in zip(names, samples, predicted, hits, strict=True)
    ]


def confusion_matrix(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts, int64 [classes, classes]: row = label, column = prediction."""
    return torch.bincount(labels * classes + predictions, minlength=classes * classes).view(classes, classes)


def most_confused(predictions: Tensor, labels: Tensor, limit: int | None = None) -> list[Confusion]:
    """Wrong (label, prediction) pairs by falling count, then by index; only pairs that occur take memory."""
    wrong = predictions != labels
    both = torch.stack([labels[wrong], predictions[wrong]], dim=1).numpy()
    pairs, counts = np.unique(both, axis=0, return_counts=True)
    found = [Confusion(a, b, n) for (a, b), n in zip(pairs.tolist(), counts.tolist(), strict=True)]
    return sorted(found, key=lambda c: (-c.count, c.label, c.prediction))[:limit]


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """|accuracy - confidence| averaged over bins of equal width by their samples (Guo et al. 2017, eq. 3).

    Args:
        confidence: probability of the predicted class, in [0, 1], [N], N >= 1.
        correct: True where that class is the label, bool [N].
    """
    index, gaps = calibration_bins(confidence, correct, bins)
    totals = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, gaps)
    return float(totals.abs().sum() / len(confidence))


def calibration_bins(confidence: Tensor, correct: Tensor, bins: int = 15) -> tuple[Tensor, Tensor]:
    """The bin (from 0) of each sample, int64 [N], and its accuracy less its confidence, float64 [N]."""
    index = (confidence.double() * bins).ceil().long().sub(1).clamp(0, bins - 1)
    return index, correct.double() - confidence.double()


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> list[CalibrationBin]:
    """The bins of `expected_calibration_error` that have samples, in rising order (Guo et al. 2017, figure 1)."""
    index, _ = calibration_bins(confidence, correct, bins)
    found = []
    for b in sorted(set(index.tolist())):
        inside = index == b
        sure, right = float(confidence[inside].double().mean()), share(correct[inside])
        found.append(CalibrationBin(b / bins, (b + 1) / bins, int(inside.sum()), sure, right))
    return found


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class over all samples: the mean precision at its positives, float64 [C].

    Ties are ordered by `torch.sort`, as in clip_benchmark. A class without positives scores NaN.

    Args:
        scores: [N, C].
        targets: 1 where the class is present, [N, C].
    """
    order = scores.argsort(dim=0, descending=True)
    truth = targets.gather(0, order).double()
    precision = truth.cumsum(0) / torch.arange(1, len(truth) + 1, dtype=torch.float64)[:, None]
    return (precision * truth).sum(0) / truth.sum(0)


@dataclass(frozen=True)
class Ranking:
    """The result of a search, for each query."""

    depth: int
    """The number K of best candidates."""
    places: Tensor
    """Position of the first correct candidate among the K best, from 1; 0: none. Ties in the order of `torch.topk`.
    int64 [Q]."""
    average_precision: Tensor
    """Average precision at K, [Q]: the mean over min(K, number of correct candidates) positions."""
    ranks: Tensor
    """Rank of the best correct candidate, from 1; ties share the mean of their ranks. float64 [Q]."""
    right: Tensor
    """Number of correct candidates, int64 [Q]."""

    def hits(self, k: int) -> Tensor:
        """True where a correct candidate is among the k best, k <= K, bool [Q]."""
        assert k <= self.depth
        return (self.places > 0) & (self.places <= k)


def rank(queries: Tensor, candidates: Tensor, query_group: Tensor, candidate_group: Tensor, depth: int) -> Ranking:
    """Search every query among all candidates; a candidate is correct if it shares a group with the query.

    A query with several correct candidates is a hit if one of them is found, as in the CLIP papers. The
    best are those of `torch.topk`, as in clip_benchmark. Only a block of the scores exists at a time.

    Args:
        queries: [Q, D]. candidates: [M, D].
        query_group: int64 [Q], or [Q, K] for up to K groups of each query; -1: none. candidate_group: the same, [M] or
            [M, K]; at most one of the two has several. Every query has a correct candidate.
        depth: number of best candidates, at most M.
    """
    assert 1 <= depth <= len(candidates)
    places, ranks, precisions, numbers = [], [], [], []
    parts = blocks(queries, len(candidates)), blocks(query_group, len(candidates))
    for block, group in zip(*parts, strict=True):
        scores = block @ candidates.T
        right = share_group(group, candidate_group)
        found = right.gather(1, scores.topk(depth, dim=1).indices)
        places.append(torch.where(found.any(dim=1), found.int().argmax(dim=1) + 1, 0))
        precision = found.cumsum(dim=1) / torch.arange(1, depth + 1)
        numbers.append(right.sum(dim=1))
        possible = numbers[-1].clamp(max=depth)
        precisions.append((precision * found).sum(dim=1).double() / possible)
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        better = (scores > best).sum(dim=1)
        equal = ((scores == best) & ~right).sum(dim=1)
        ranks.append(1 + better.double() + equal.double() / 2)
    return Ranking(depth, torch.cat(places), torch.cat(precisions), torch.cat(ranks), torch.cat(numbers))


def share_group(queries: Tensor, candidates: Tensor) -> Tensor:
    """True where a query [q] or [q, K] shares a group with a candidate [M] or [M, K], bool [q, M]."""
    if queries.ndim == candidates.ndim == 1:
        return queries[:, None] == candidates[None, :]
    right = torch.zeros(len(queries), len(candidates), dtype=torch.bool)
    for of_query in queries.reshape(len(queries), -1).T:
        for of_candidate in candidates.reshape(len(candidates), -1).T:
            right |= (of_query[:, None] == of_candidate[None, :]) & (of_query >= 0)[:, None]
    return right


def share(values: Tensor) -> float:
    """The fraction of true values. bool [N], N >= 1."""
    return int(values.sum()) / len(values)


def blocks(rows: Tensor, columns: int) -> Iterator[Tensor]:
    """The rows in blocks whose scores against `columns` candidates fit in memory."""
    step = max(1, SCORES_PER_BLOCK // columns)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
