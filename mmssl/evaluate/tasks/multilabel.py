"""Several labels an image: mean average precision of zero-shot scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.labels import label_index, where
from mmssl.evaluate.metrics import ranking as metrics
from mmssl.stats import Interval, bootstrap
from mmssl.types import Sample

FIELDS = ("labels", "label", "cls")
"""Where the labels are looked for: the first of these that the sample has."""


@dataclass(frozen=True)
class MultiLabel:
    """Zero-shot scores judged against sets of labels. N samples, C classes."""

    metrics: dict[str, float]
    """`mean_average_precision` over the classes that have positives, `classes` C and `samples` N."""
    intervals: dict[str, Interval]
    per_class: Tensor
    """Average precision, NaN without positives, [C]."""


def labels_of_sample(dataset: Dataset, sample: Sample) -> list[int | str]:
    """The labels of a sample: class indices, or names where the data set has no class names.

    Raises:
        UserError: it has no list of labels, or one does not fit the class names.
    """
    fields = FIELDS if dataset.label is None else (dataset.label,)
    field = next((f for f in fields if f in sample.fields), None)
    if field is None or not isinstance(sample.fields[field], list):
        has = ", ".join(sorted(sample.fields)) or "none"
        raise UserError(
            f"{where(sample)} has no list of labels in {' or '.join(map(repr, fields))} (its fields: {has}); "
            "name the JSON entry that holds the list"
        )
    return [label_index(dataset, sample, value) for value in sample.fields[field]]


def label_matrix(dataset: Dataset, samples: Sequence[Sample]) -> tuple[tuple[str, ...], Tensor]:
    """Class names (if not given, the sorted labels), and 1 where a sample has a class, int64 [N, C].

    Raises:
        UserError: no sample has a label, or one does not fit the class names.
    """
    labels = [labels_of_sample(dataset, sample) for sample in samples]
    if not any(labels):
        raise UserError(
            f"no sample of {samples[0].shard} has a label: all lists are empty; name the JSON entry that holds them"
        )
    names = dataset.classnames
    if names is None:
        names = tuple(sorted({str(label) for of_sample in labels for label in of_sample}))
    position: dict[int | str, int] = {name: index for index, name in enumerate(names)}
    targets = torch.zeros(len(samples), len(names), dtype=torch.int64)
    for row, of_sample in enumerate(labels):
        for label in of_sample:
            targets[row, label if isinstance(label, int) else position[label]] = 1
    return names, targets


def evaluate_scores(scores: Tensor, targets: Tensor) -> MultiLabel:
    """Compare scores [N, C] with targets [N, C]."""
    per_class = metrics.average_precision(scores, targets)
    figures: dict[str, float] = {"mean_average_precision": float(per_class.nanmean())}
    intervals = bootstrap(
        lambda rows: {
            "mean_average_precision": float(metrics.average_precision(scores[rows], targets[rows]).nanmean())
        },
        len(scores),
        resamples=200,
    )
    return MultiLabel(figures | {"classes": scores.shape[1], "samples": len(scores)}, intervals, per_class)
