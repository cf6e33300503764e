"""Every evaluation of a model on every data set."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from mmssl.data.sample import BadSample
from mmssl.distributed import Processes
from mmssl.evaluate import tables
from mmssl.evaluate.datasets import Dataset, label_of, open_dataset, read, training_split
from mmssl.evaluate.embed import ALONE, Encoder, Pictures, Progress, embed_pictures
from mmssl.evaluate.tables import Metrics
from mmssl.evaluate.tasks import Job, known
from mmssl.types import Sample, UserError

Check = Callable[[Sample], Any]
"""Raises UserError for a sample that a task cannot use."""
DEFAULT_TASKS = {"classification": "zero_shot", "multilabel": "multilabel", "retrieval": "retrieval"}


def default_task(dataset: Dataset) -> str:
    """What a data set is made for."""
    return DEFAULT_TASKS[dataset.kind]


def run(
    encoder: Encoder,
    datasets: Mapping[str, tuple[str | Path | Dataset, str]],
    out: Path | None = None,
    *,
    batch_size: int = 256,
    logit_scale: float | None = None,
    draw: bool = True,
    slice_by: Sequence[str] = (),
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> dict[str, Metrics]:
    """Judge a model; data sets of the same shards are read and encoded once.

    Args:
        datasets: name -> data set (or its folder or pattern) and task (`mmssl.evaluate.tasks.TASKS` names them).
        out: folder for results.json and, in NAME/TASK/, tables (CSV) and pictures (PNG). None: write nothing.
        logit_scale: the model's factor from similarities to logits, for calibration and the examples' bars.
        draw: also draw the PNGs, which reads the shards once more.
        slice_by: metadata fields to break the accuracies of classifications down by.
        processes: the ranks that share the work; all call alike, get the same figures, and rank 0 writes.
        progress: called with `NAME: pictures` or `NAME: texts` and how many are done.
    Returns:
        `NAME/TASK` -> figures, in the order of `datasets`, with 95 % `intervals`, the widest `gaps` between
        slices, and `bad_samples` where some could not be used.
    Raises:
        UserError: bad data, an unknown task or an unwritable folder, found before anything of a data set is written.
    """
    if out is not None:
        _check_writable(out)
    plan = {name: (_opened(name, data), known(name, task)) for name, (data, task) in datasets.items()}
    keys = {name: f"{name}/{task}" for name, (_, task) in datasets.items()}
    results: dict[str, Metrics] = {key: {} for key in keys.values()}
    folder = out if processes.rank == 0 else None
    for names in _by_shards({name: dataset for name, (dataset, _) in plan.items()}):
        first = plan[names[0]][0]
        embed = partial(_embed, encoder, batch_size=batch_size, processes=processes, progress=progress)
        embedded, bad = embed(first, names[0], [partial(plan[n][1].check, plan[n][0]) for n in names])
        training = cache(partial(_embed_training, embed, first, names[0]))
        for name in names:
            dataset, task = plan[name]
            job = Job(
                encoder=encoder,
                name=name,
                dataset=dataset,
                embedded=embedded,
                training=training,
                folder=None if folder is None else folder / keys[name],
                draw=draw,
                slice_by=slice_by,
                batch_size=batch_size,
                logit_scale=logit_scale,
                processes=processes,
                progress=_named(name, progress),
            )
            results[keys[name]] = task.run(job) | ({"bad_samples": bad} if bad else {})
    if folder is not None:
        tables.write_json(folder / "results.json", results)
    return results


def _embed(
    encoder: Encoder,
    dataset: Dataset,
    name: str,
    checks: Sequence[Check],
    *,
    batch_size: int,
    processes: Processes,
    progress: Progress | None,
) -> tuple[Pictures, int]:
    """The encoded pictures of a data set, and how many samples could not be used."""
    bad: list[BadSample] = []
    samples = _checked(read(dataset, bad.append), checks)
    told = _named(name, progress)
    found = embed_pictures(encoder, samples, batch_size=batch_size, processes=processes, progress=told)
    return found, len(bad) + len(found.bad)


def _embed_training(embed: Callable[..., tuple[Pictures, int]], dataset: Dataset, name: str) -> Pictures:
    labelled = partial(label_of, dataset)
    return embed(training_split(dataset), f"{name} (training split)", [labelled])[0]


def _check_writable(folder: Path) -> None:
    """Before hours of work, and without leaving a trace."""
    nearest = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {nearest} is no folder that may be written; give another one")


def _opened(name: str, data: str | Path | Dataset) -> Dataset:
    return data if isinstance(data, Dataset) else open_dataset(data, name=name)


def _by_shards(datasets: Mapping[str, Dataset]) -> list[list[str]]:
    """The names that read the same shards, together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, dataset in datasets.items():
        groups.setdefault(dataset.shards, []).append(name)
    return list(groups.values())


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
