"""Evaluation of a model on several datasets and tasks."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from mmssl.data import account_of
from mmssl.data.shards import BadSample
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset, open_dataset, read, training_split
from mmssl.evaluate.encode import ALONE, EncodedImages, Encoder, Progress, encode_images, gather_values
from mmssl.evaluate.feature_cache import FeatureCache
from mmssl.evaluate.first_dimensions import dimension_key, shorten_context
from mmssl.evaluate.labels import UnusableSampleError, sample_label
from mmssl.evaluate.task import Metrics, Task, TaskContext
from mmssl.evaluate.tasks import find_task
from mmssl.files import write_json
from mmssl.types import Sample

Check = Callable[[Sample], Any]
"""Raises UnusableSampleError for a sample that a task cannot use, UserError if it cannot use the dataset."""
FIRST = 1000
"""Samples after which a dataset without a usable one is refused."""
REMEDY = "raise that limit: --bad-samples of the commands, evaluate.bad_samples in training"
_log = logging.getLogger(__name__)
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
    logit_curve: float = 0.0
    """Of calibrated logits: see `metrics.calibration.bend`."""
    bad_samples: float = 0.1
    """Largest fraction of a dataset's samples that may be unusable; of fewer than 100, it is that of 100."""
    limit: int | None = None
    """Evaluate the first samples of each dataset only; without a cache. None: all."""
    draw: bool = True
    """Draw plots and write examples; this reads their images again."""
    cache: FeatureCache | None = None
    """Cache of this model's features. None: no cache."""
    dims: tuple[int, ...] = ()
    """Evaluate the first D dimensions of the embeddings for each D of these, as `NAME/TASK@D`, in place of all."""
    world: World = ALONE
    """Ranks that share the work. All call with the same arguments and get the same metrics; rank 0 writes."""
    progress: Progress | None = None
    """Callback: `NAME: images` or `NAME: texts`, and the number done."""
    finished: Callable[[str, Metrics], None] | None = None
    """Callback after each evaluation: `NAME/TASK` and its metrics."""
    failed: Callable[[str, Exception], None] | None = None
    """Callback with an evaluation that failed, `NAME/TASK`, and the error; the others go on. None: the error ends
    all."""


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
        `NAME/TASK` (`NAME/TASK@D` with `dims`) -> metrics, in the order of `datasets`, with 95 % `intervals`, the
        widest `gaps` between groups, and `bad_samples` if some could not be used.
    Raises:
        UserError: bad data, an unknown task or an unwritable folder, found before results of the dataset are written;
            with `options.failed`, bad data are reported there.
    """
    options = options or SuiteOptions()
    if out is not None:
        _check_writable(out)
    plan = list(_plan(datasets))
    results: dict[str, Metrics] = {key: {} for evaluation in plan for key in _keys(evaluation, options)}
    folder = out if options.world.rank == 0 else None
    encoded = DatasetEncoder(encoder, options)
    for group in _by_shards(plan):
        keys = [key for evaluation in group for key in _keys(evaluation, options)]
        with _reported(keys, results, options):
            images = encoded.encode(group[0].dataset, group[0].name, [evaluation.check for evaluation in group])
        for evaluation in group:
            keys = [key for key in _keys(evaluation, options) if key in results]
            with _reported(keys, results, options):
                for key, metrics in _evaluate(evaluation, encoded, images, folder) if keys else ():
                    results[key] = metrics
                    if options.finished is not None:
                        options.finished(key, metrics)
    if folder is not None:
        write_json(folder / "results.json", results)
    return results


def _keys(evaluation: "_Evaluation", options: SuiteOptions) -> list[str]:
    """The names of the results of an evaluation."""
    return [dimension_key(evaluation.key, dim) for dim in options.dims] or [evaluation.key]


def _evaluate(
    evaluation: "_Evaluation", encoded: "DatasetEncoder", images: EncodedImages, folder: Path | None
) -> Iterator[tuple[str, Metrics]]:
    """The results of a task on encoded images: of all dimensions, or for each number of them."""
    options = encoded.options
    usable = usable_images(images, evaluation.check)
    report_bad(evaluation.key, usable, options)
    place = None if folder is None else folder / evaluation.key
    context = encoded.context(evaluation.name, evaluation.dataset, usable, place)
    bad = {"bad_samples": len(usable.bad)} if usable.bad else {}
    if not options.dims:
        yield evaluation.key, evaluation.task.run(context) | bad
    texts: dict[tuple[str, ...], Tensor] = {}
    for dim in options.dims:
        key = dimension_key(evaluation.key, dim)
        place = None if folder is None else folder / key
        yield key, evaluation.task.run(shorten_context(context, dim, place, texts)) | bad


def check_readable(datasets: Mapping[str, tuple[Dataset, Sequence[str]]]) -> None:
    """Read the beginning of each dataset, before hours of work whose evaluation would fail.

    Raises:
        UserError: a dataset cannot be read, or has no sample that a task can use among the first ones.
    """
    for group in _by_shards(list(_plan(datasets))):
        waiting: dict[str, UserError | None] = {evaluation.key: None for evaluation in group}
        for sample in islice(read(group[0].dataset, lambda bad: None), FIRST):
            for evaluation in group:
                if evaluation.key in waiting:
                    try:
                        evaluation.check(sample)
                        del waiting[evaluation.key]
                    except UnusableSampleError as error:
                        waiting[evaluation.key] = waiting[evaluation.key] or error
            if not waiting:
                break
        for key, problem in waiting.items():
            raise problem or UserError(f"{key}: no sample to evaluate: the shards are empty; give shards with samples")


def usable_images(images: EncodedImages, check: Check) -> EncodedImages:
    """The images whose samples pass a check; the others join the bad samples."""
    kept, bad = [], list(images.bad)
    for row, sample in enumerate(images.samples):
        try:
            check(sample)
            kept.append(row)
        except UnusableSampleError as error:
            bad.append(BadSample(sample.shard, sample.key, error.reason))
    if len(kept) == len(images.samples):
        return images
    return EncodedImages(images.features[kept], [images.samples[row] for row in kept], bad)


@contextmanager
def _reported(keys: Sequence[str], results: dict[str, Metrics], options: SuiteOptions) -> Iterator[None]:
    """With `options.failed`, report an error instead of raising it, and take the evaluations out of the results."""
    try:
        yield
    except Exception as error:
        # Other errors than bad input may concern one rank only, and the others would wait for it.
        if options.failed is None or (options.world.size > 1 and not isinstance(error, UserError)):
            raise
        for key in keys:
            del results[key]
            options.failed(key, error)


def report_bad(name: str, images: EncodedImages, options: SuiteOptions) -> None:
    """Count the samples of a dataset that are left out by cause, and name one of each.

    Raises:
        UserError: they are more than the limit.
    """
    if not images.bad:
        return
    account = account_of(len(images.samples), images.bad)
    try:
        account.limit(options.bad_samples, REMEDY)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if options.world.rank == 0:
        causes = "; ".join(account.causes())
        _log.warning("%s: %d of %d samples are left out: %s", name, account.omitted, account.offered, causes)


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
        self.options = options
        self._training: dict[tuple[str, ...], EncodedImages] = {}

    def encode(self, dataset: Dataset, name: str, checks: Sequence[Check]) -> EncodedImages:
        """The images of a dataset; its bad samples include those that could not be read.

        Samples that a task cannot use are among them: the cache is for all tasks. `usable_images` leaves them out.

        Raises:
            UserError: no sample passes one of the checks.
        """
        found = self._cached(dataset, "")
        if found is not None:
            for _ in _checked(found.samples, checks):
                pass
            return found
        unread: list[BadSample] = []
        samples = _checked(islice(read(dataset, unread.append), self.options.limit), checks)
        found = self._encode(self._encoder, samples, name)
        found = replace(found, bad=unread + found.bad)
        self._keep(dataset, "", found)
        return found

    def encode_training(self, dataset: Dataset, name: str) -> EncodedImages:
        """The images of the training split."""
        split = training_split(dataset)
        if split.shards not in self._training:
            labelled = partial(sample_label, split)
            images = self.encode(split, f"{name} (training split)", [labelled])
            usable = usable_images(images, labelled)
            report_bad(f"{name} (training split)", usable, self.options)
            self._training[split.shards] = usable
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
            draw=self.options.draw,
            batch_size=self.options.batch_size,
            logit_scale=self.options.logit_scale,
            logit_curve=self.options.logit_curve,
            world=self.options.world,
            progress=_named(name, self.options.progress),
        )

    def _encode(self, encoder: Encoder, samples: Iterable[Sample], name: str) -> EncodedImages:
        return encode_images(
            encoder,
            samples,
            batch_size=self.options.batch_size,
            world=self.options.world,
            progress=_named(name, self.options.progress),
        )

    def _cached(self, dataset: Dataset, variant: str) -> EncodedImages | None:
        """Features from the cache, if all ranks find them."""
        cache = self.options.cache
        if cache is None:
            return None
        key = cache.key(dataset.shards, variant)
        found = None if key is None else cache.load(key, dataset.shards)
        return found if all(gather_values(self.options.world, found is not None)) else None

    def _keep(self, dataset: Dataset, variant: str, found: EncodedImages) -> None:
        cache = self.options.cache
        key = None if cache is None else cache.key(dataset.shards, variant)
        if cache is not None and key is not None and self.options.world.rank == 0:
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


def _checked(samples: Iterable[Sample], checks: Sequence[Check]) -> Iterator[Sample]:
    """The samples. If none passes a check, at the beginning or at all, its first error is raised."""
    passed, problems = [False] * len(checks), dict[int, UserError]()
    for number, sample in enumerate(samples, start=1):
        for place, check in enumerate(checks):
            try:
                check(sample)
                passed[place] = True
            except UnusableSampleError as error:
                problems.setdefault(place, error)
        if number == FIRST:
            _refuse_unusable(passed, problems)
        yield sample
    _refuse_unusable(passed, problems)


def _refuse_unusable(passed: Sequence[bool], problems: Mapping[int, UserError]) -> None:
    for place, problem in problems.items():
        if not passed[place]:
            raise problem


def _named(name: str, progress: Progress | None) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done: progress(f"{name}: {what}", done)
