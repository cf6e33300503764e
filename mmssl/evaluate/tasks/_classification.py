"""Results common to all classifications: tables, examples, and groups of samples."""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from mmssl.evaluate import examples
from mmssl.evaluate.datasets import Dataset, training_split
from mmssl.evaluate.labels import sample_label
from mmssl.evaluate.metrics import groups
from mmssl.evaluate.metrics.classification import Classification
from mmssl.evaluate.metrics.groups import GroupAccuracy
from mmssl.evaluate.metrics.ranking import ClassRow
from mmssl.evaluate.task import Metrics, Task, TaskContext, list_baselines, list_intervals
from mmssl.files import write_csv
from mmssl.types import Sample

MAIN_METRICS = ("acc1", "acc5", "mean_per_class_recall")


class TrainedTask(Task):
    """A task that trains a classifier on the dataset's training split."""

    def ready(self, dataset: Dataset) -> None:
        """Require a training split."""
        training_split(dataset)

    def check(self, dataset: Dataset, sample: Sample) -> None:
        """Require a label that fits the class names."""
        sample_label(dataset, sample)


def report_classification(
    context: TaskContext, found: Classification, scores: Callable[[Tensor], Tensor], probable: bool
) -> Metrics:
    """The metrics with intervals and gaps between groups; tables and examples go to the task's folder.

    Args:
        scores: features [n, D] -> scores of the classes [n, C], for the bars of the examples.
        probable: the scores are probabilities.
    """
    samples = context.images.samples
    correct = (found.predictions == found.labels).numpy()
    members = {field: groups.group_rows(samples, field) for field in context.dataset.slice_by}
    if context.folder is not None:
        by_field = {field: groups.group_accuracies(correct, values) for field, values in members.items()}
        _write_tables(context.folder, samples, found, by_field)
        if context.draw:
            examples.show_classification(context, found, scores, probable)
    metrics: Metrics = found.metrics | list_intervals(found.intervals) | list_baselines(found.baselines)
    for field, values in members.items():
        gap = groups.widest_gap(correct, values)
        metrics.setdefault("gaps", {})[field] = None if gap is None else vars(gap)
    return metrics


def _write_tables(
    folder: Path, samples: list[Sample], found: Classification, by_field: dict[str, list[GroupAccuracy]]
) -> None:
    write_per_class(folder / "per_class.csv", found.per_class)
    names = found.classnames
    confusions = ((names[c.label], names[c.prediction], c.count) for c in found.confusions)
    write_csv(folder / "confusions.csv", ("label", "prediction", "count"), confusions)
    _write_predictions(folder / "predictions.csv", samples, found)
    if found.calibration:
        bins = ((b.low, b.high, b.samples, b.confidence, b.accuracy) for b in found.calibration)
        write_csv(folder / "calibration.csv", ("low", "high", "samples", "confidence", "accuracy"), bins)
    if by_field:
        rows = ((field, g.group, g.samples, g.accuracy, *g.interval) for field, gs in by_field.items() for g in gs)
        write_csv(folder / "slices.csv", ("field", "group", "samples", "accuracy", "low", "high"), rows)


def write_per_class(path: Path, rows: Iterable[ClassRow]) -> None:
    """class, samples, recall, precision; a rate without a denominator is empty."""
    values = ((r.name, r.samples, r.recall, r.precision) for r in rows)
    write_csv(path, ("class", "samples", "recall", "precision"), values)


def _write_predictions(path: Path, samples: list[Sample], found: Classification) -> None:
    """One row per sample: shard, key, label, then the best classes and their scores, best first."""
    ranks = range(1, found.outcome.best.shape[1] + 1)
    header = ("shard", "key", "label", *(f"class{n}" for n in ranks), *(f"score{n}" for n in ranks))
    labels, best, scores = (t.tolist() for t in (found.labels, found.outcome.best, found.outcome.scores))
    names = found.classnames
    rows = (
        (sample.shard, sample.key, names[label], *(names[c] for c in classes), *values)
        for sample, label, classes, values in zip(samples, labels, best, scores, strict=True)
    )
    write_csv(path, header, rows)
