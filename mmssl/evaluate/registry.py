"""The tasks by name: what each measures on a data set and what it leaves in its folder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate import plots as drawings
from mmssl.evaluate import results as tables
from mmssl.evaluate.classifiers import logistic_regression as probe
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.encode import encode_texts
from mmssl.evaluate.labels import class_indices, image_captions, sample_label
from mmssl.evaluate.metrics import embedding as geometry
from mmssl.evaluate.metrics import groups as slices
from mmssl.evaluate.metrics import ranking as metrics
from mmssl.evaluate.metrics.classification import Classification, evaluate_predictions, list_length
from mmssl.evaluate.results import Metrics
from mmssl.evaluate.task import Task, TaskContext, requires_training_split
from mmssl.evaluate.tasks import associations, corruptions, fine_tune, knn, multilabel, retrieval, zero_shot
from mmssl.evaluate.tasks import corruptions as corrupted_image
from mmssl.stats import Interval, means
from mmssl.types import Sample

SEEDS = 5
"""Random draws of training samples in few-shot classification."""
HELD_OUT = 0.2
"""Share of the training samples on which the linear probe chooses its regularisation."""


def _zero_shot(job: TaskContext) -> Metrics:
    found = zero_shot.evaluate(
        job.encoder,
        job.dataset,
        job.embedded,
        batch_size=job.batch_size,
        logit_scale=job.logit_scale,
        world=job.world,
        progress=job.progress,
    )

    def scores(features: Tensor) -> Tensor:
        similarity = features @ found.weights.T
        return similarity if job.logit_scale is None else (job.logit_scale * similarity).softmax(dim=1)

    return _classification(job, found.judged, scores, probable=job.logit_scale is not None)


def _linear_probe(job: TaskContext) -> Metrics:
    train, train_labels, labels, names = _training(job)
    rows = probe.hold_out(train_labels, HELD_OUT, seed=0)
    fitted, c = probe.probe(train, train_labels, rows, len(names))
    outcome = metrics.best_of(fitted.scores(job.embedded.features), list_length(len(names)))
    judged = evaluate_predictions(outcome, labels, names)
    found = _classification(job, judged, lambda features: fitted.scores(features).softmax(dim=1), probable=True)
    return found | {"train_samples": len(train), "c": c}


def _knn(job: TaskContext) -> Metrics:
    train, train_labels, labels, names = _training(job)
    k = min(knn.NEIGHBOURS, len(train))

    def scores(features: Tensor) -> Tensor:
        votes = knn.knn_scores(features, train, train_labels, len(names), k=k)
        return votes / votes.sum(dim=1, keepdim=True)

    judged = evaluate_predictions(
        metrics.best_of(scores(job.embedded.features), list_length(len(names))), labels, names
    )
    return _classification(job, judged, scores, probable=True) | {"train_samples": len(train), "k": k}


def _few_shot(job: TaskContext) -> Metrics:
    """Linear probes on k samples of each class, the mean over draws, for each k that every class has."""
    train, train_labels, labels, names = _training(job)
    right: dict[str, NDArray[np.float64]] = {}
    spread: dict[str, float] = {}
    for k in probe.shots_of(train_labels):
        draws = []
        for seed in range(SEEDS):
            if job.progress is not None:
                job.progress(f"few-shot, {k} a class, draw", seed + 1)
            rows = probe.draw_shots(train_labels, k, seed)
            fitted, _ = probe.probe(train, train_labels, rows, len(names), refit=False)
            draws.append((fitted.scores(job.embedded.features).argmax(1) == labels).numpy())
        right[f"acc1@{k}"] = np.mean(draws, axis=0)
        spread[f"std@{k}"] = float(np.std([d.mean() for d in draws], ddof=1))
    _keep_outcomes(job, job.embedded.samples, right)
    figures, intervals = means(right)
    counts = {"classes": len(names), "samples": len(labels), "draws": SEEDS}
    return figures | spread | counts | _listed(intervals)


def _multilabel(job: TaskContext) -> Metrics:
    names, targets = multilabel.label_matrix(job.dataset, job.embedded.samples)
    found = multilabel.evaluate_scores(job.embedded.features @ job.class_weights(names).T, targets)
    if job.folder is not None:
        tables.write_average_precisions(job.folder / "per_class.csv", names, targets.sum(0).tolist(), found.per_class)
    return found.metrics | _listed(found.intervals)


def _retrieval(job: TaskContext) -> Metrics:
    found = retrieval.evaluate(
        job.encoder, job.embedded, batch_size=job.batch_size, world=job.world, progress=job.progress
    )
    if job.folder is not None:
        tables.write_ranks(job.folder / "ranks.csv", job.embedded.samples, found)
        if job.draw:
            drawings.draw_retrieval(job.folder, job.name, job.dataset, job.embedded, found)
    return found.metrics | _listed(found.intervals)


def _geometry(job: TaskContext) -> Metrics:
    """The first caption of each image stands for its texts.

    Raises:
        UserError: there is one sample only.
    """
    texts = [image_captions(sample)[0] for sample in job.embedded.samples]
    if len(texts) < 2:
        raise UserError(f"task 'geometry' of data set {job.name!r} needs two samples or more; there is one")
    features = encode_texts(job.encoder, texts, batch_size=job.batch_size, world=job.world, progress=job.progress)
    return geometry.geometry(job.embedded.features, features) | {"samples": len(texts)}


def _corruptions(job: TaskContext) -> Metrics:
    """The image shows one sample under everything, with the accuracies."""
    found, images = corruptions.evaluate(job)
    _keep_outcomes(job, images, found.right)
    if job.folder is not None:
        corruptions.write_table(job.folder / "corruptions.csv", found)
        if job.draw:
            corrupted_image.draw(job.folder / "corruptions.png", job.name, images[0], found)
    return found.metrics | _listed(found.intervals)


def _fine_tune(job: TaskContext) -> Metrics:
    found = fine_tune.evaluate(job)
    _keep_outcomes(job, job.embedded.samples, found.right)
    if job.folder is not None:
        fine_tune.write_table(job.folder / "alphas.csv", found)
    return found.metrics | _listed(found.intervals)


def _associations(job: TaskContext) -> Metrics:
    """Which of the neutral class names is seen in the images of each group."""
    names = job.dataset.classnames
    assert names is not None
    predictions = metrics.top_k(job.embedded.features, job.class_weights(names), 1).first.tolist()
    groups = {field: slices.group_rows(job.embedded.samples, field) for field in job.dataset.slice_by}
    found = associations.audit(predictions, names, groups)
    if job.folder is not None:
        associations.write_table(job.folder / "associations.csv", found)
    gaps = {f"{a.field}: {a.classname}": None if a.gap is None else vars(a.gap) for a in found}
    counts = {"classes": len(names), "samples": len(predictions), "real_gaps": len(associations.real_gaps(found))}
    return counts | {"gaps": gaps, "note": associations.NOTE}


def _classification(
    job: TaskContext, found: Classification, scores: Callable[[Tensor], Tensor], probable: bool
) -> Metrics:
    correct = (found.predictions == found.labels).numpy()
    groups = {field: slices.group_rows(job.embedded.samples, field) for field in job.dataset.slice_by}
    by_field = {field: slices.slice_by(correct, values) for field, values in groups.items()}
    if job.folder is not None:
        tables.write_per_class(job.folder / "per_class.csv", found.per_class)
        tables.write_confusions(job.folder / "confusions.csv", found.confusions, found.classnames)
        tables.write_predictions(job.folder / "predictions.csv", job.embedded.samples, found)
        if found.calibration:
            tables.write_calibration(job.folder / "calibration.csv", found.calibration)
        if by_field:
            tables.write_slices(job.folder / "slices.csv", by_field)
        if job.draw:
            drawings.draw_classification(job.folder, job.name, job.dataset, job.embedded, found, scores, probable)
    figures: Metrics = found.metrics | _listed(found.intervals)
    for field, values in groups.items():
        gap = slices.widest_gap(correct, values)
        figures.setdefault("gaps", {})[field] = None if gap is None else vars(gap)
    return figures


def _keep_outcomes(job: TaskContext, samples: Sequence[Sample], outcomes: Mapping[str, NDArray[Any]]) -> None:
    if job.folder is not None:
        values = {name: of_sample.astype(np.float64).tolist() for name, of_sample in outcomes.items()}
        tables.write_outcomes(job.folder / "outcomes.csv", samples, values)


def _listed(intervals: dict[str, Interval]) -> Metrics:
    """As JSON reads them back."""
    return {"intervals": {name: list(interval) for name, interval in intervals.items()}}


def _training(job: TaskContext) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Training features and labels, the labels of the images to judge, and the class names of both."""
    train = job.training()
    names, both = class_indices(job.dataset, [*train.samples, *job.embedded.samples])
    return train.features, both[: len(train.samples)], both[len(train.samples) :], names


def _caption(dataset: Dataset, sample: Sample) -> None:
    image_captions(sample)


def _any_sample(dataset: Dataset, sample: Sample) -> None:
    """Every sample will do."""


TASKS: dict[str, Task] = {
    "zero_shot": Task(_zero_shot, sample_label),
    "retrieval": Task(_retrieval, _caption),
    "multilabel": Task(_multilabel, multilabel.labels_of_sample),
    "linear_probe": Task(_linear_probe, sample_label, requires_training_split),
    "few_shot": Task(_few_shot, sample_label, requires_training_split),
    "knn": Task(_knn, sample_label, requires_training_split),
    "geometry": Task(_geometry, _caption),
    "corruptions": Task(_corruptions, sample_label, corruptions.installed),
    "fine_tune": Task(_fine_tune, sample_label, requires_training_split),
    "associations": Task(_associations, _any_sample, associations.ready),
}
"""What can be measured, by name."""


def get_task(name: str, task: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r} for data set {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[task]
