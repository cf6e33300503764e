"""`mmssl eval`: the verb, and how figures are printed."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.distributed import World
    from mmssl.evaluate.datasets import Dataset
    from mmssl.evaluate.feature_cache import FeatureCache
    from mmssl.evaluate.results import Metrics
    from mmssl.inference import Model

Data = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="Data sets: folders in CLIP_benchmark's WebDataset layout, folders of such, patterns of shards.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="What to measure; repeat, or separate by commas: zero_shot, retrieval, multilabel, linear_probe, "
        "few_shot, knn, geometry, corruptions, fine_tune, associations. Default: what each data set is made for.",
    ),
]
Classnames = Annotated[
    str | None, typer.Option(help="File of class names, one a line, or 'imagenet', instead of the data set's own.")
]
Templates = Annotated[
    str | None,
    typer.Option(help="File of prompt templates with {c}, or 'openai-imagenet', instead of the data set's own."),
]
Label = Annotated[str | None, typer.Option(help="JSON field that holds the class, for shards without .cls members.")]
SliceBy = Annotated[
    list[str] | None,
    typer.Option(help="Metadata field (an entry of the JSON member) to break accuracies down by; repeat."),
]
Language = Annotated[
    list[str] | None,
    typer.Option(help="Judge with classnames.LANGUAGE.txt and the templates of that language; repeat."),
]
Shift = Annotated[
    list[str] | None,
    typer.Option(help="A:B, two data sets with the same classes: the drop of the accuracy from A to B; repeat."),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps the images' features for the next evaluation of the same model and shards. "
        "Default: mmssl/features in $XDG_CACHE_HOME, or in ~/.cache."
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither keep features nor use kept ones.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images or captions a forward pass.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]


def evaluate(
    model: Annotated[str, typer.Argument(help="A run or a model folder.")],
    data: Data,
    task: Tasks = None,
    slice_by: SliceBy = None,
    classnames: Classnames = None,
    templates: Templates = None,
    language: Language = None,
    label: Label = None,
    shift: Shift = None,
    json_file: JsonFile = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tables and plots.")] = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    batch_size: BatchSize = 256,
    device: Device = None,
) -> None:
    """Judge a model on data sets; what each task measures is told in docs/evaluation.md.

    On many processes, which share the images: torchrun --nproc_per_node N -m mmssl eval MODEL DATA..., or
    accelerate launch --num_processes N -m mmssl eval MODEL DATA...
    """
    from mmssl.apps.report import card_beside
    from mmssl.distributed import process_group
    from mmssl.evaluate import suite
    from mmssl.evaluate.metrics import shift as shifted

    datasets = find(
        data, languages=language, classnames=classnames, templates=templates, label=label, slice_by=slice_by or ()
    )
    plan = {name: (dataset, parse_tasks(dataset, task)) for name, dataset in datasets.items()}
    pairs = shifted.pairs(shift or (), datasets)
    make_places(out, json_file)
    card = card_beside(Path(model), out)
    with process_group() as world:
        judged = load_on(model, device)
        with progress_bar(sum(len(tasks) for _, tasks in plan.values()), world) as (tell, tick):
            results = suite.run(
                judged,
                plan,
                out,
                batch_size=batch_size,
                logit_scale=judged.logit_scale,
                cache=None if no_cache else open_cache(judged, cache),
                world=world,
                progress=tell,
                finished=lambda name, figures: tick(),
            )
        if world.rank == 0:
            results |= shifted.shifts(results, pairs)
            print_results(results)
            if json_file is not None:
                write_json(json_file, results)
            if card is not None:
                print(card.renewed())


def find(
    data: Sequence[str],
    *,
    languages: Sequence[str] | None = None,
    classnames: str | None = None,
    templates: str | None = None,
    label: str | None = None,
    slice_by: Sequence[str] = (),
) -> "dict[str, Dataset]":
    """The data sets that are named on the command line, by their names.

    Raises:
        UserError: there is none, a file beside them is missing or wrong, or two have one name.
    """
    from mmssl.evaluate.datasets import find_datasets, open_dataset

    datasets: dict[str, Dataset] = {}
    for spec in data:
        for name, place in find_datasets(spec).items() if Path(spec).is_dir() else [(None, spec)]:
            for language in languages or (None,):
                dataset = open_dataset(
                    place,
                    name=name,
                    classnames=classnames,
                    templates=templates,
                    label=label,
                    slice_by=slice_by,
                    language=language,
                )
                if dataset.name in datasets:
                    raise UserError(f"two data sets are named {dataset.name!r}; judge them by two commands")
                datasets[dataset.name] = dataset
    return datasets


def parse_tasks(dataset: "Dataset", given: Sequence[str] | None) -> list[str]:
    """The tasks that were asked for, each once, or what the data set is made for.

    Raises:
        UserError: one is unknown, or the data set lacks what it needs.
    """
    from mmssl.evaluate.registry import get_task
    from mmssl.evaluate.suite import default_task

    words = [word.strip() for words in given or [] for word in words.split(",")]
    tasks = list(dict.fromkeys(words)) or [default_task(dataset)]
    for task in tasks:
        get_task(dataset.name, task).ready(dataset)
    return tasks


def load_on(model: str, device: str | None) -> "Model":
    """A model on the device that was asked for.

    Raises:
        UserError: there is no such model or device.
    """
    from mmssl.inference import load

    return move(load(model), device)


def move(model: "Model", device: str | None) -> "Model":
    """Move a model to the device that was asked for, or to the usual one.

    Raises:
        UserError: there is no such device.
    """
    return model.to(parse_device(device))


def parse_device(device: str | None) -> str:
    """The device that was asked for; without one, this process's GPU, if there is any.

    Raises:
        UserError: there is no such device.
    """
    import torch

    if device is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


def open_cache(model: "Model", folder: Path | None) -> "FeatureCache":
    """Where the features of a model are kept.

    Raises:
        UserError: nothing can be written there.
    """
    from mmssl.evaluate.feature_cache import FeatureCache, default_folder

    place = default_folder() if folder is None else folder
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache {place} cannot be written: {error.strerror}; give another, or --no-cache") from None
    return FeatureCache(place, model.fingerprint())


def make_folder(out: Path, option: str = "--out") -> None:
    """Make a folder for results.

    Raises:
        UserError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {out} cannot be written: {error.strerror}; pick another folder") from None


def make_places(out: Path | None, json_file: Path | None) -> None:
    """Make the folders of what will be written, before hours of work.

    Raises:
        UserError: one cannot be made.
    """
    if out is not None:
        make_folder(out)
    if json_file is not None:
        make_folder(json_file.absolute().parent, "--json in")


def write_json(path: Path, tree: object) -> None:
    """Write figures.

    Raises:
        UserError: the file cannot be written.
    """
    from mmssl.files import write_json as write

    try:
        write(path, tree)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another file by --json") from None


@contextmanager
def progress_bar(total: int, world: "World") -> Iterator[tuple[Callable[[str, int], None], Callable[[], None]]]:
    """A bar over the evaluations on rank 0: what to call with what is done within one, and after each."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("evaluations"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=world.rank != 0) as bar:
        line = bar.add_task("starting", total=total)
        yield lambda what, done: bar.update(line, description=f"{what} {done:,}"), lambda: bar.advance(line)


def print_results(results: "Mapping[str, Metrics]") -> None:
    """One row a figure, with its bootstrap interval where there is one."""
    from mmssl.evaluate.console import format_figures

    if not results:
        return
    table = Table(
        Column("data set / task", overflow="fold"),
        Column("figure", no_wrap=True),
        Column("value", no_wrap=True),
        Column("95 % interval", overflow="fold"),
    )
    # As Text: names of data sets and groups may hold what would be markup.
    for name, figures in results.items():
        for place, row in enumerate(format_figures(figures)):
            table.add_row(Text(name if place == 0 else ""), *map(Text, row))
    Console().print(table)
    for name, figures in results.items():
        if "note" in figures:
            Console().print(Text(f"{name}: {figures['note']}"))
