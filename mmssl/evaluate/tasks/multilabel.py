"""Several labels per image: mean average precision of zero-shot scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.labels import UnusableSampleError, in_order, label_index
from mmssl.evaluate.metrics import ranking
from mmssl.evaluate.task import Metrics, Task, TaskContext, list_intervals
from mmssl.files import write_csv
from mmssl.stats import Interval, bootstrap
from mmssl.types import Sample

FIELDS = ("labels", "label", "cls")
"""Fields that may hold the labels; the first one that a sample has is used."""


class MultiLabel(Task):
    """Compare similarities to class prompts with sets of labels."""

    name = "multilabel"
    label = "several labels per image, zero-shot"
    description = "Mean average precision of prompts where images have several labels."
    main_metrics = ("mean_average_precision",)

    def check(self, dataset: Dataset, sample: Sample) -> None:
        """Require a list of labels that fit the class names."""
        list_labels(dataset, sample)

    def run(self, context: TaskContext) -> Metrics:
        """Write the average precision of each class to per_class.csv (empty without positives)."""
        names, targets = label_matrix(context.dataset, context.images.samples)
        found = evaluate_scores(context.images.features @ context.class_weights(names).T, targets)
        if context.folder is not None:
            precisions = (None if math.isnan(p) else p for p in found.per_class.tolist())
            rows = zip(names, targets.sum(0).tolist(), precisions, strict=True)
            write_csv(context.folder / "per_class.csv", ("class", "positives", "average_precision"), rows)
        return found.metrics | list_intervals(found.intervals)


@dataclass(frozen=True)
class AveragePrecisions:
    """Scores of N samples and C classes, compared with sets of labels."""

    metrics: dict[str, float]
    """`mean_average_precision` over the classes that have positives, `classes` C and `samples` N."""
    intervals: dict[str, Interval]
    per_class: Tensor
    """Average precision, NaN without positives, [C]."""


def list_labels(dataset: Dataset, sample: Sample) -> list[int | str]:
    """The labels of a sample: class indices, or names if the dataset has no class names.

    Raises:
        UnusableSampleError: it has no list of labels.
        UserError: a label does not fit the class names.
    """
    fields = FIELDS if dataset.label is None else (dataset.label,)
    field = next((f for f in fields if f in sample.fields), None)
    if field is None or not isinstance(sample.fields[field], list):
        has = ", ".join(sorted(sample.fields)) or "none"
        raise UnusableSampleError(
            sample,
            f"it has no list of labels in {' or '.join(map(repr, fields))} (its fields: {has}); "
            "name the JSON entry that holds the list",
        )
    named = replace(dataset, values_may_differ=False)
    return [label_index(named, sample, value) for value in sample.fields[field]]


def label_matrix(dataset: Dataset, samples: Sequence[Sample]) -> tuple[tuple[str, ...], Tensor]:
    """Class names (if not given, the sorted labels), and 1 where a sample has a class, int64 [N, C].

    Raises:
        UserError: no sample has a label, or one does not fit the class names.
    """
    labels = [list_labels(dataset, sample) for sample in samples]
    if not any(labels):
        raise UserError(
            f"no sample of {samples[0].shard} has a label: all lists are empty; name the JSON entry that holds them"
        )
    names = dataset.classnames
    if names is None:
        names = in_order(str(label) for row in labels for label in row)
    position: dict[int | str, int] = {name: index for index, name in enumerate(names)}
    targets = torch.zeros(len(samples), len(names), dtype=torch.int64)
    for row, entries in enumerate(labels):
        for label in entries:
            targets[row, label if isinstance(label, int) else position[label]] = 1
    return names, targets


def evaluate_scores(scores: Tensor, targets: Tensor) -> AveragePrecisions:
    """Compare scores [N, C] with targets [N, C]."""
    per_class = ranking.average_precision(scores, targets)
    metrics: dict[str, float] = {"mean_average_precision": float(per_class.nanmean())}
    intervals = bootstrap(
        lambda rows: {
            "mean_average_precision": float(ranking.average_precision(scores[rows], targets[rows]).nanmean())
        },
        len(scores),
        resamples=200,
    )
    return AveragePrecisions(metrics | {"classes": scores.shape[1], "samples": len(scores)}, intervals, per_class)
