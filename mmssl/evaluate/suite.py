"""Evaluation of a model on several datasets and tasks."""

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
from mmssl.evaluate.encode import ALONE, EncodedImages, Encoder, Progress, encode_images, gather_values
from mmssl.evaluate.feature_cache import FeatureCache
from mmssl.evaluate.labels import sample_label
from mmssl.evaluate.task import Metrics, Task, TaskContext
from mmssl.evaluate.tasks import find_task
from mmssl.files import write_json
from mmssl.types import Sample

Check = Callable[[Sample], Any]
"""Raises UserError for a sample that a task cannot use."""
DEFAULT_TASKS = {"classification": "zero_shot", "multilabel": "multilabel", "retrieval": "retrieval"}


def default_task(dataset: Dataset) -> str:
    """The task for the kind of a dataset."""
    return DEFAULT_TASKS[dataset.kind]


@dataclass(frozen=True)
class SuiteOptions:
    """Options of all evaluations of a model."""

    batch_size: int = 256
    """Images or texts per forward pass."""
    logit_scale: float | None = None
    """The model's factor from similarities to logits, for calibration and the bars of examples."""
    draw: bool = True
    """Draw plots and write examples; this reads their images again."""
    cache: FeatureCache | None = None
    """Cache of this model's features. None: no cache."""
    world: World = ALONE
    """Ranks that share the work. All call with the same arguments and get the same metrics; rank 0 writes."""
    progress: Progress | None = None
    """Callback: `NAME: images` or `NAME: texts`, and the number done."""
    finished: Callable[[str, Metrics], None] | None = None
    """Callback after each evaluation: `NAME/TASK` and its metrics."""


def run(
    encoder: Encoder,
    datasets: Mapping[str, tuple[str | Path | Dataset, str | Sequence[str]]],
    out: Path | None = None,
    options: SuiteOptions | None = None,
) -> dict[str, Metrics]:
    """Evaluate a model; datasets with the same shards are read and encoded once.

    Args:
        datasets: name -> dataset (or its folder or pattern) and its task or tasks (names or paths, `my_lab:MyTask`).
        out: folder for results.json and, in NAME/TASK/, tables (CSV), examples and plots. None: write nothing.
    Returns:
        `NAME/TASK` -> metrics, in the order of `datasets`, with 95 % `intervals`, the widest `gaps` between
        groups, and `bad_samples` if some could not be used.
    Raises:
        UserError: bad data, an unknown task or an unwritable folder, found before results of the dataset are written.
    """
    options = options or SuiteOptions()
    if out is not None:
        _check_writable(out)
    plan = list(_plan(datasets))
    results: dict[str, Metrics] = {evaluation.key: {} for evaluation in plan}
    folder = out if options.world.rank == 0 else None
    encoded = DatasetEncoder(encoder, options)
    for group in _by_shards(plan):
        images = encoded.encode(group[0].dataset, group[0].name, [evaluation.check for evaluation in group])
        bad = {"bad_samples": len(images.bad)} if images.bad else {}
        for evaluation in group:
            place = None if folder is None else folder / evaluation.key
            context = encoded.context(evaluation.name, evaluation.dataset, images, place)
            results[evaluation.key] = evaluation.task.run(context) | bad
            if options.finished is not None:
                options.finished(evaluation.key, results[evaluation.key])
    if folder is not None:
        write_json(folder / "results.json", results)
    return results


@dataclass(frozen=True)
class _Evaluation:
    """One task on one dataset."""

    name: str
    dataset: Dataset
    task: Task

    @property
    def key(self) -> str:
        """NAME/TASK."""
        return f"{self.name}/{self.task.name}"

    def check(self, sample: Sample) -> None:
        """Refuse a sample that the task cannot use."""
        self.task.check(self.dataset, sample)


class DatasetEncoder:
    """Features of datasets, from the cache where possible. Training splits are kept, as several tasks use them."""

    def __init__(self, encoder: Encoder, options: SuiteOptions) -> None:
        self._encoder = encoder
        self._options = options
        self._training: dict[tuple[str, ...], EncodedImages] = {}

    def encode(self, dataset: Dataset, name: str, checks: Sequence[Check]) -> EncodedImages:
        """The images of a dataset; its bad samples include those that could not be read."""
        found = self._cached(dataset, "")
        if found is not None:
            for sample in found.samples:
                for check in checks:
                    check(sample)
            return found
        unread: list[BadSample] = []
        samples = _checked(read(dataset, unread.append), checks)
        found = self._encode(self._encoder, samples, name)
        found = replace(found, bad=unread + found.bad)
        self._keep(dataset, "", found)
        return found

    def encode_training(self, dataset: Dataset, name: str) -> EncodedImages:
        """The images of the training split."""
        split = training_split(dataset)
        if split.shards not in self._training:
            labelled = partial(sample_label, split)
            self._training[split.shards] = self.encode(split, f"{name} (training split)", [labelled])
        return self._training[split.shards]

    def encode_variant(
        self, dataset: Dataset, name: str, encoder: Encoder, samples: Iterable[Sample], variant: str
    ) -> EncodedImages:
        """Features of changed images of a dataset; `variant` names the change for the cache and the progress."""
        found = self._cached(dataset, variant)
        if found is None:
            found = self._encode(encoder, samples, f"{name}: {variant}")
            self._keep(dataset, variant, found)
        return found

    def context(self, name: str, dataset: Dataset, images: EncodedImages, folder: Path | None) -> TaskContext:
        """The context of a task on the images of a dataset."""
        return TaskContext(
            encoder=self._encoder,
            name=name,
            dataset=dataset,
            images=images,
            training_images=partial(self.encode_training, dataset, name),
            encode_variant=partial(self.encode_variant, dataset, name),
            folder=folder,
            draw=self._options.draw,
            batch_size=self._options.batch_size,
            logit_scale=self._options.logit_scale,
            world=self._options.world,
            progress=_named(name, self._options.progress),
        )

    def _encode(self, encoder: Encoder, samples: Iterable[Sample], name: str) -> EncodedImages:
        return encode_images(
            encoder,
            samples,
            batch_size=self._options.batch_size,
            world=self._options.world,
            progress=_named(name, self._options.progress),
        )

    def _cached(self, dataset: Dataset, variant: str) -> EncodedImages | None:
        """Features from the cache, if all ranks find them."""
        cache = self._options.cache
        if cache is None:
            return None
        key = cache.key(dataset.shards, variant)
        found = None if key is None else cache.load(key, dataset.shards)
        return found if all(gather_values(self._options.world, found is not None)) else None

    def _keep(self, dataset: Dataset, variant: str, found: EncodedImages) -> None:
        cache = self._options.cache
        key = None if cache is None else cache.key(dataset.shards, variant)
        if cache is not None and key is not None and self._options.world.rank == 0:
            cache.store(key, dataset.shards, found)


def _plan(datasets: Mapping[str, tuple[str | Path | Dataset, str | Sequence[str]]]) -> Iterator[_Evaluation]:
    for name, (data, tasks) in datasets.items():
        dataset = data if isinstance(data, Dataset) else open_dataset(data, name=name)
        for task in [tasks] if isinstance(tasks, str) else tasks:
            found = find_task(task)
            found.ready(dataset)
            yield _Evaluation(name, dataset, found)


def _by_shards(plan: Sequence[_Evaluation]) -> list[list[_Evaluation]]:
    """Evaluations grouped by the shards that they read."""
    groups: dict[tuple[str, ...], list[_Evaluation]] = {}
    for evaluation in plan:
        groups.setdefault(evaluation.dataset.shards, []).append(evaluation)
    return list(groups.values())


def _check_writable(folder: Path) -> None:
    """Refuse an unwritable folder before hours of work, without creating it."""
    nearest = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {nearest} is not a writable folder; give another one")


def _checked(samples: Iterator[Sample], checks: Sequence[Check]) -> Iterator[Sample]:
    """The samples. One that a task cannot use is refused before it is encoded."""
    for sample in samples:
        for check in checks:
            check(sample)
        yield sample


def _named(name: str, progress: Progress | None) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done: progress(f"{name}: {what}", done)
