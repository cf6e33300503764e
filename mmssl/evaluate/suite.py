"""Every evaluation of a model on every data set."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmssl.data.shards import BadSample
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset, open_dataset, read, training_split
from mmssl.evaluate.encode import ALONE, EncodedImages, Encoder, Progress, encode_images, from_all
from mmssl.evaluate.feature_cache import FeatureCache
from mmssl.evaluate.labels import sample_label
from mmssl.evaluate.registry import get_task
from mmssl.evaluate.results import Metrics
from mmssl.evaluate.task import Task, TaskContext
from mmssl.files import write_json
from mmssl.types import Sample

Check = Callable[[Sample], Any]
"""Raises UserError for a sample that a task cannot use."""
DEFAULT_TASKS = {"classification": "zero_shot", "multilabel": "multilabel", "retrieval": "retrieval"}


def default_task(dataset: Dataset) -> str:
    """What a data set is made for."""
    return DEFAULT_TASKS[dataset.kind]


def run(
    encoder: Encoder,
    datasets: Mapping[str, tuple[str | Path | Dataset, str | Sequence[str]]],
    out: Path | None = None,
    *,
    batch_size: int = 256,
    logit_scale: float | None = None,
    draw: bool = True,
    cache: FeatureCache | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
    finished: Callable[[str, Metrics], None] | None = None,
) -> dict[str, Metrics]:
    """Judge a model; data sets of the same shards are read and encoded once.

    Args:
        datasets: name -> dataset (or its folder or pattern) and its task or tasks.
        out: folder for results.json and, in NAME/TASK/, tables (CSV) and images (PNG). None: write nothing.
        logit_scale: the model's factor from similarities to logits, for calibration and the examples' bars.
        draw: also draw the PNGs, which reads the shards once more.
        cache: where features of this model are kept. None: nowhere.
        processes: the ranks that share the work; all call alike, get the same figures, and rank 0 writes.
        progress: called with `NAME: images` or `NAME: texts` and how many are done.
        finished: called with `NAME/TASK` and its figures after each evaluation.
    Returns:
        `NAME/TASK` -> figures, in the order of `datasets`, with 95 % `intervals`, the widest `gaps` between
        slices, and `bad_samples` where some could not be used.
    Raises:
        UserError: bad data, an unknown task or an unwritable folder, found before anything of a data set is written.
    """
    if out is not None:
        _check_writable(out)
    plan = list(_plan(datasets))
    results: dict[str, Metrics] = {evaluation.key: {} for evaluation in plan}
    folder = out if world.rank == 0 else None
    embedding = EncodedDataset(encoder, batch_size, cache, world, progress)
    for group in _by_shards(plan):
        embedded = embedding.of(group[0].dataset, group[0].name, [evaluation.check for evaluation in group])
        bad = {"bad_samples": len(embedded.bad)} if embedded.bad else {}
        for evaluation in group:
            place = None if folder is None else folder / evaluation.key
            job = embedding.job(evaluation.name, evaluation.dataset, embedded, place, draw, logit_scale)
            results[evaluation.key] = evaluation.task.run(job) | bad
            if finished is not None:
                finished(evaluation.key, results[evaluation.key])
    if folder is not None:
        write_json(folder / "results.json", results)
    return results


@dataclass(frozen=True)
class _Evaluation:
    """One task on one data set."""

    key: str
    """NAME/TASK."""
    name: str
    dataset: Dataset
    task: Task

    def check(self, sample: Sample) -> None:
        """Refuse a sample that lacks what the task needs."""
        self.task.check(self.dataset, sample)


class EncodedDataset:
    """Features of data sets, from the cache where they are there. Training splits are kept, several tasks use them."""

    def __init__(
        self,
        encoder: Encoder,
        batch_size: int,
        cache: FeatureCache | None,
        world: World,
        progress: Progress | None,
    ) -> None:
        self._encoder = encoder
        self._batch_size = batch_size
        self._cache = cache
        self._world = world
        self._progress = progress
        self._training: dict[tuple[str, ...], EncodedImages] = {}

    def of(self, dataset: Dataset, name: str, checks: Sequence[Check]) -> EncodedImages:
        """The images of a data set, its bad samples with those that could not be read."""
        found = self._cached(dataset, "")
        if found is not None:
            for sample in found.samples:
                for check in checks:
                    check(sample)
            return found
        unread: list[BadSample] = []
        samples = _checked(read(dataset, unread.append), checks)
        found = self._embed(self._encoder, samples, name)
        found = replace(found, bad=unread + found.bad)
        self._keep(dataset, "", found)
        return found

    def of_training(self, dataset: Dataset, name: str) -> EncodedImages:
        """The images of the training split."""
        split = training_split(dataset)
        if split.shards not in self._training:
            labelled = partial(sample_label, split)
            self._training[split.shards] = self.of(split, f"{name} (training split)", [labelled])
        return self._training[split.shards]

    def changed(
        self, dataset: Dataset, name: str, encoder: Encoder, samples: Iterable[Sample], variant: str
    ) -> EncodedImages:
        """Images of a data set that something was done to; `variant` says what, for the cache and for progress."""
        found = self._cached(dataset, variant)
        if found is None:
            found = self._embed(encoder, samples, f"{name}: {variant}")
            self._keep(dataset, variant, found)
        return found

    def job(
        self,
        name: str,
        dataset: Dataset,
        embedded: EncodedImages,
        folder: Path | None,
        draw: bool,
        logit_scale: float | None,
    ) -> TaskContext:
        """What a task on the images of a data set is given."""
        return TaskContext(
            encoder=self._encoder,
            name=name,
            dataset=dataset,
            embedded=embedded,
            training=partial(self.of_training, dataset, name),
            embed=partial(self.changed, dataset, name),
            folder=folder,
            draw=draw,
            batch_size=self._batch_size,
            logit_scale=logit_scale,
            world=self._world,
            progress=_named(name, self._progress),
        )

    def _embed(self, encoder: Encoder, samples: Iterable[Sample], name: str) -> EncodedImages:
        return encode_images(
            encoder,
            samples,
            batch_size=self._batch_size,
            world=self._world,
            progress=_named(name, self._progress),
        )

    def _cached(self, dataset: Dataset, variant: str) -> EncodedImages | None:
        """From the cache, if all ranks find it there."""
        if self._cache is None:
            return None
        key = self._cache.key(dataset.shards, variant)
        found = None if key is None else self._cache.load(key, dataset.shards)
        return found if all(from_all(self._world, found is not None)) else None

    def _keep(self, dataset: Dataset, variant: str, found: EncodedImages) -> None:
        key = None if self._cache is None else self._cache.key(dataset.shards, variant)
        if self._cache is not None and key is not None and self._world.rank == 0:
            self._cache.store(key, dataset.shards, found)


def _plan(datasets: Mapping[str, tuple[str | Path | Dataset, str | Sequence[str]]]) -> Iterator[_Evaluation]:
    for name, (data, tasks) in datasets.items():
        dataset = data if isinstance(data, Dataset) else open_dataset(data, name=name)
        for task in [tasks] if isinstance(tasks, str) else tasks:
            method = get_task(name, task)
            method.ready(dataset)
            yield _Evaluation(f"{name}/{task}", name, dataset, method)


def _by_shards(plan: Sequence[_Evaluation]) -> list[list[_Evaluation]]:
    """Those that read the same shards, together."""
    groups: dict[tuple[str, ...], list[_Evaluation]] = {}
    for evaluation in plan:
        groups.setdefault(evaluation.dataset.shards, []).append(evaluation)
    return list(groups.values())


def _check_writable(folder: Path) -> None:
    """Before hours of work, and without leaving a trace."""
    nearest = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {nearest} is no folder that may be written; give another one")


def _checked(samples: Iterator[Sample], checks: Sequence[Check]) -> Iterator[Sample]:
    """The samples, each refused before it is encoded when it lacks what a task needs."""
    for sample in samples:
        for check in checks:
            check(sample)
        yield sample


def _named(name: str, progress: Progress | None) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done: progress(f"{name}: {what}", done)
