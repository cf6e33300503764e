"""Results as files: JSON, and tables as CSV."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmssl.evaluate.metrics.classification import Classification
from mmssl.evaluate.metrics.groups import Slice
from mmssl.evaluate.metrics.ranking import CalibrationBin, ClassRow, Confusion
from mmssl.evaluate.tasks.retrieval import Retrieval
from mmssl.files import write_csv
from mmssl.types import Sample

Metrics = dict[str, Any]
"""One evaluation's figures by name."""

MAIN_METRICS = (
    "acc1",
    "acc5",
    "mean_per_class_recall",
    "mean_average_precision",
    "image_retrieval_recall@5",
    "text_retrieval_recall@5",
)
"""The figures that sum an evaluation up, in the order in which they are shown."""
LOWER_IS_BETTER = ("calibration_error", "median_rank", "bad_samples")
"""Endings of the names of metrics for which lower is better."""


def write_per_class(path: Path, rows: Iterable[ClassRow]) -> None:
    """class, samples, recall, precision; a rate without a denominator is empty."""
    write_csv(
        path,
        ("class", "samples", "recall", "precision"),
        ((r.name, r.samples, r.recall, r.precision) for r in rows),
    )


def write_confusions(path: Path, confusions: Iterable[Confusion], classnames: Sequence[str]) -> None:
    """label, prediction, count of every wrong pair."""
    rows = ((classnames[c.label], classnames[c.prediction], c.count) for c in confusions)
    write_csv(path, ("label", "prediction", "count"), rows)


def write_predictions(path: Path, samples: Sequence[Sample], found: Classification) -> None:
    """One row a sample: shard, key, label, then the best classes and their scores, best first."""
    ranks = range(1, found.outcome.best.shape[1] + 1)
    header = ("shard", "key", "label", *(f"class{n}" for n in ranks), *(f"score{n}" for n in ranks))
    labels, best, scores = (t.tolist() for t in (found.labels, found.outcome.best, found.outcome.scores))
    names = found.classnames
    rows = (
        (sample.shard, sample.key, names[label], *(names[c] for c in classes), *values)
        for sample, label, classes, values in zip(samples, labels, best, scores, strict=True)
    )
    write_csv(path, header, rows)


def write_ranks(path: Path, samples: Sequence[Sample], found: Retrieval) -> None:
    """One row an image and one a caption: rank (equals share the mean of theirs) of the first right thing that it
    finds, and its place among the best that were looked at (empty: not among them)."""
    images = ((sample, "text", "") for sample in samples)
    captions = (
        (samples[image], "image", text)
        for image, text in zip(found.image_of_caption.tolist(), found.captions, strict=True)
    )
    rows = (
        (sample.shard, sample.key, retrieval, text, rank, place or None)
        for queries, ranking in ((images, found.text_ranks), (captions, found.image_ranks))
        for (sample, retrieval, text), rank, place in zip(
            queries, ranking.ranks.tolist(), ranking.places.tolist(), strict=True
        )
    )
    write_csv(path, ("shard", "key", "retrieval", "caption", "rank", "place"), rows)


def write_outcomes(path: Path, samples: Sequence[Sample], outcomes: Mapping[str, Iterable[float]]) -> None:
    """One row a sample and one column a figure, which is the mean of its column."""
    rows = ((s.shard, s.key, *values) for s, *values in zip(samples, *outcomes.values(), strict=True))
    write_csv(path, ("shard", "key", *outcomes), rows)


def write_calibration(path: Path, bins: Iterable[CalibrationBin]) -> None:
    """low, high, samples, confidence, accuracy: how often predictions of about one probability are right."""
    rows = ((b.low, b.high, b.samples, b.confidence, b.accuracy) for b in bins)
    write_csv(path, ("low", "high", "samples", "confidence", "accuracy"), rows)


def write_slices(path: Path, slices: Mapping[str, Sequence[Slice]]) -> None:
    """field, group, samples, accuracy and its interval of every slice."""
    rows = ((field, s.group, s.samples, s.accuracy, *s.interval) for field, rows in slices.items() for s in rows)
    write_csv(path, ("field", "group", "samples", "accuracy", "low", "high"), rows)


def write_average_precisions(path: Path, names: Sequence[str], positives: Sequence[int], precisions: Tensor) -> None:
    """class, positives, average precision (empty without positives)."""
    values = (None if math.isnan(p) else p for p in precisions.tolist())
    write_csv(path, ("class", "positives", "average_precision"), zip(names, positives, values, strict=True))
