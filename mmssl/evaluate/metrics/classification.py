"""Evaluation of any classifier, zero-shot or trained: metrics and intervals, classes, confusions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mmssl.evaluate.metrics import baselines, ranking
from mmssl.evaluate.metrics.baselines import Baselines
from mmssl.evaluate.metrics.ranking import CalibrationBin, ClassRow, Confusion, Outcome
from mmssl.stats import Interval, Rows, bootstrap


@dataclass(frozen=True)
class Classification:
    """A classification of N samples into C classes, compared with the labels."""

    metrics: dict[str, float]
    """`acc1`, `acc5` (from 5 classes on), `mean_per_class_recall`, `calibration_error` (of probabilities),
    `classes` C and `samples` N."""
    intervals: dict[str, Interval]
    """95 % bootstrap intervals of the metrics, over samples: class by class where the classes have unequal sizes."""
    baselines: Baselines
    """`majority` and `chance` of the metrics that have them."""
    classnames: tuple[str, ...]
    """Unique class names: equal ones have their class number appended."""
    per_class: list[ClassRow]
    confusions: list[Confusion]
    """Every wrong pair of label and prediction, the most frequent first."""
    calibration: list[CalibrationBin]
    """Accuracy of predictions by probability; empty without probabilities."""
    labels: Tensor
    """int64 [N]."""
    outcome: Outcome
    """The best classes of each sample."""

    @property
    def predictions(self) -> Tensor:
        """int64 [N]."""
        return self.outcome.first


def list_length(classes: int) -> int:
    """Number of best classes that are kept: 5, or 1 with fewer than 5 classes."""
    return 5 if classes >= 5 else 1


def evaluate_predictions(
    outcome: Outcome, labels: Tensor, classnames: Sequence[str], confidence: Tensor | None = None
) -> Classification:
    """Compare a classifier's outcome with the labels, int64 [N].

    Args:
        confidence: probability of each predicted class, [N], for the calibration error.
    """
    names = distinct(classnames)
    k = outcome.best.shape[1]
    values: dict[str, float] = {f"acc{n}": ranking.top_k_accuracy(outcome.best, labels, n) for n in (1, 5) if n <= k}
    values["mean_per_class_recall"] = ranking.mean_per_class_recall(outcome.first, labels)
    if confidence is not None:
        values["calibration_error"] = ranking.expected_calibration_error(confidence, outcome.first == labels)
    values |= {"classes": len(classnames), "samples": len(labels)}
    return Classification(
        metrics=values,
        intervals=_intervals(outcome, labels, confidence),
        baselines=baselines.of_classes(labels, list(values)),
        classnames=names,
        per_class=ranking.per_class(outcome.first, labels, names),
        confusions=ranking.most_confused(outcome.first, labels),
        calibration=[] if confidence is None else ranking.reliability(confidence, outcome.first == labels),
        labels=labels,
        outcome=outcome,
    )


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Class names for tables; names that occur twice (as two of ImageNet's do) get their class number appended."""
    count = Counter(names)
    return tuple(f"{name} ({index})" if count[name] > 1 else name for index, name in enumerate(names))


def _intervals(outcome: Outcome, labels: Tensor, confidence: Tensor | None) -> dict[str, Interval]:
    true = labels.numpy()
    right = outcome.first == labels
    listed = (outcome.best == labels[:, None]).numpy().cumsum(axis=1)
    bins, gaps = ranking.calibration_bins(confidence, right) if confidence is not None else (None, None)

    def measure(rows: Rows) -> dict[str, float]:
        samples = np.bincount(true[rows])
        hits = np.bincount(true[rows], weights=right.numpy()[rows])
        present = samples > 0
        found = {f"acc{n}": float(listed[rows, n - 1].mean()) for n in (1, 5) if n <= listed.shape[1]}
        found["mean_per_class_recall"] = float((hits[present] / samples[present]).mean())
        if bins is not None and gaps is not None:
            totals = np.bincount(bins.numpy()[rows], weights=gaps.numpy()[rows])
            found["calibration_error"] = float(np.abs(totals).sum() / len(rows))
        return found

    fractions = {name: float(len(true)) for name in measure(np.arange(len(true))) if name.startswith("acc")}
    # Samples that tell as much about the mean recall as these do: all of them where the classes have equal sizes.
    sizes = np.unique(true, return_counts=True)[1]
    fractions["mean_per_class_recall"] = len(sizes) ** 2 / float((1 / sizes).sum())
    return bootstrap(measure, len(true), strata=true, fractions=fractions)
