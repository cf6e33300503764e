"""Every evaluation of a model on every data set, and what it leaves on disk."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmssl.data.reader import BadSample
from mmssl.evaluate import report, retrieval, tables, zero_shot
from mmssl.evaluate.datasets import Dataset, captions_of, label_of, open_dataset, read
from mmssl.evaluate.embed import Encoder, Pictures, Progress, embed_pictures
from mmssl.evaluate.tables import Metrics
from mmssl.types import Sample, UserError


@dataclass(frozen=True)
class Job:
    """One task on one data set, its pictures already encoded."""

    encoder: Encoder
    name: str
    dataset: Dataset
    embedded: Pictures
    folder: Path | None
    """Where tables and pictures go. None: nowhere."""
    draw: bool
    """Whether to draw pictures too."""
    batch_size: int
    logit_scale: float | None
    progress: Progress | None


def default_task(dataset: Dataset) -> str:
    """What a data set is made for: retrieval where it says so, else zero-shot classification."""
    return "retrieval" if dataset.kind == "retrieval" else "zero_shot"


def run(
    encoder: Encoder,
    datasets: Mapping[str, tuple[str | Path | Dataset, str]],
    out: Path | None = None,
    *,
    batch_size: int = 256,
    logit_scale: float | None = None,
    draw: bool = True,
    progress: Progress | None = None,
) -> dict[str, Metrics]:
    """Judge a model; data sets of the same shards are read and encoded once.

    Args:
        datasets: name -> data set (or its folder or pattern) and task.
        out: folder for results.json and, in NAME/TASK/, tables (CSV) and pictures (PNG). None: write nothing.
        logit_scale: the model's factor from similarities to logits, for calibration and the examples' bars.
        draw: also draw the PNGs, which reads the shards once more.
        progress: called with `NAME: pictures` or `NAME: texts` and how many are done.
    Returns:
        `NAME/TASK` -> figures, in the order of `datasets`; with `bad_samples` where some could not be used.
    Raises:
        UserError: bad data or an unknown task, found before anything of that data set is written.
    """
    plan = {name: (_opened(name, data), _known(name, task)) for name, (data, task) in datasets.items()}
    results: dict[str, Metrics] = {f"{name}/{task}": {} for name, (_, task) in plan.items()}
    for names in _by_shards(plan):
        bad: list[BadSample] = []
        samples = read(plan[names[0]][0], bad.append)
        for name in names:
            samples = _checked(samples, *plan[name])
        embedded = embed_pictures(
            encoder, samples, batch_size=batch_size, progress=_named(names[0], progress)
        )
        bad += embedded.bad
        for name in names:
            dataset, task = plan[name]
            folder = None if out is None else out / name / task
            job = Job(
                encoder,
                name,
                dataset,
                embedded,
                folder,
                draw,
                batch_size,
                logit_scale,
                _named(name, progress),
            )
            results[f"{name}/{task}"] = TASKS[task](job) | ({"bad_samples": len(bad)} if bad else {})
    if out is not None:
        tables.write_json(out / "results.json", results)
    return results


def _zero_shot(job: Job) -> Metrics:
    found = zero_shot.evaluate(
        job.encoder,
        job.dataset,
        job.embedded,
        batch_size=job.batch_size,
        logit_scale=job.logit_scale,
        progress=job.progress,
    )
    if job.folder is not None:
        tables.write_per_class(job.folder / "per_class.csv", found.per_class)
        tables.write_confusions(job.folder / "confusions.csv", found.confusions, found.classnames)
        tables.write_predictions(job.folder / "predictions.csv", job.embedded.samples, found)
        if job.draw:
            report.draw_zero_shot(job.folder, job.name, job.dataset, job.embedded, found, job.logit_scale)
    return dict(found.metrics)


def _retrieval(job: Job) -> Metrics:
    found = retrieval.evaluate(job.encoder, job.embedded, batch_size=job.batch_size, progress=job.progress)
    if job.folder is not None and job.draw:
        report.draw_retrieval(job.folder, job.name, job.dataset, job.embedded, found)
    return dict(found.metrics)


TASKS: dict[str, Callable[[Job], Metrics]] = {"zero_shot": _zero_shot, "retrieval": _retrieval}
"""What can be measured, by name."""


def _opened(name: str, data: str | Path | Dataset) -> Dataset:
    return data if isinstance(data, Dataset) else open_dataset(data, name=name)


def _known(name: str, task: str) -> str:
    if task not in TASKS:
        raise UserError(f"unknown task {task!r} for data set {name!r}; the tasks are {', '.join(TASKS)}")
    return task


def _by_shards(plan: Mapping[str, tuple[Dataset, str]]) -> list[list[str]]:
    """The names that read the same shards, together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, (dataset, _) in plan.items():
        groups.setdefault(dataset.shards, []).append(name)
    return list(groups.values())


def _checked(samples: Iterator[Sample], dataset: Dataset, task: str) -> Iterator[Sample]:
    """The samples, each refused before it is encoded when it lacks what the task needs."""
    for sample in samples:
        if task == "retrieval":
            captions_of(sample)
        else:
            label_of(sample, dataset)
        yield sample


def _named(name: str, progress: Progress | None) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done: progress(f"{name}: {what}", done)
