"""Parts that the verbs share: registration, options, progress bars, output paths, models, datasets and result tables.

Heavy imports stand inside the functions, so that `mmssl --help` stays fast.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from mmssl.errors import UserError, console
from mmssl.evaluate.tasks import task_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.status import Status

    from mmssl.evaluate import Metrics, datasets, feature_cache
    from mmssl.inference import Model

Function = TypeVar("Function", bound=Callable[..., Any])

VERBS: list[tuple[int, str | None, Callable[..., Any] | typer.Typer]] = []
"""Every verb and group: its place in `mmssl --help`, its name, and what it runs."""


def verb(place: int, name: str | None = None) -> Callable[[Function], Function]:
    """Make a function a verb of `mmssl`.

    Args:
        place: position among the verbs in `mmssl --help`; any free number.
        name: default: the function's.
    """

    def register(function: Function) -> Function:
        VERBS.append((place, name, function))
        return function

    return register


def group(place: int, name: str, text: str) -> typer.Typer:
    """Make a group of verbs, `mmssl NAME VERB`. Groups follow the verbs in `mmssl --help`."""
    app = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
    VERBS.append((place, name, app))
    return app


ModelName = Annotated[
    str,
    typer.Argument(
        help="Run or model folder, open_clip:MODEL/TAG, or folder of an open_clip or Hugging Face CLIP model."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the configuration, for example optim.lr=1e-3 train.steps=100.",
    ),
]
Data = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="Datasets: folders in CLIP_benchmark's WebDataset layout, folders of such folders, or shard patterns; or "
        "labelled images: a folder of images per class, or a table with a column of labels.",
    ),
]
OptionalData = Annotated[list[str] | None, Data.__metadata__[0]]
"""The same where an option may stand in for it."""
ImageMember = Annotated[
    list[str] | None,
    typer.Option(
        "--image-member",
        metavar="NAME",
        help="Member of the shards that holds the image, if it is not named as usual: img_content for KEY.img_content, "
        "input.jpg for KEY.input.jpg or KEY/input.jpg; repeat for further names.",
    ),
]
CaptionMember = Annotated[
    list[str] | None,
    typer.Option("--caption-member", metavar="NAME", help="The same for the caption, for example output.txt."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help=f"Task to run: {', '.join(task_names())}, or the path of your own, my_module:MyTask; repeat, or separate "
        "by commas. Default: the task that fits each dataset.",
    ),
]
Classnames = Annotated[
    str | None, typer.Option(help="File with one class name per line, or 'imagenet'. Default: the dataset's own.")
]
Templates = Annotated[
    str | None,
    typer.Option(help="File of prompt templates with {c}, or 'openai-imagenet'. Default: the dataset's own."),
]
Label = Annotated[
    str | None,
    typer.Option(help="JSON field, or column of a table, that holds the class. Default: .cls, or else 'label'."),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Folder for image features, reused when the same model is evaluated on the same shards. "
        "Default: mmssl/features in $XDG_CACHE_HOME, or in ~/.cache."
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither write nor read cached features.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(help="Number format of the towers. auto: bf16 where this device multiplies it faster than fp32."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images or captions per forward pass.")]
BadSamples = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Largest fraction of the samples that may be left out because they cannot be used; of fewer than 100, it "
        "is that of 100.",
    ),
]
ImageColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of a table with image paths or images; its number without header; several with commas in between. "
        "Default: found by name."
    ),
]
CaptionColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of a table with captions; its number without header; several with commas in between. "
        "Default: found by name."
    ),
]
Dim = Annotated[
    int | None,
    typer.Option(
        min=1, help="Use only the first dimensions of the embeddings, for models trained with dims (Matryoshka)."
    ),
]
Separator = Annotated[
    str | None, typer.Option(help="Separator of a text table: tab, comma, ';' ... Default: recognised.")
]
Encoding = Annotated[str | None, typer.Option(help="Encoding of a text table: utf-8, cp1252 ... Default: recognised.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the metrics to this file.")]


def counted(count: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is one: "1 shard", "2,000 shards"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def stdout() -> "Console":
    """The console for tables and sentences."""
    return console()


def status(text: str) -> "Status":
    """A spinner on stderr while the block runs."""
    from rich.text import Text

    return console(stderr=True).status(Text(text))  # as it is: names may look like markup


class ProgressBar:
    """A progress bar on stderr, empty where stderr is no terminal."""

    def __init__(self, progress: "Progress", task: "TaskID") -> None:
        self._progress = progress
        self._task = task

    def describe(self, text: str, done: int | None = None) -> None:
        """Show the work within one unit, for example ("images", 1024)."""
        self._progress.update(self._task, description=text if done is None else f"{text} {done:,}")

    def advance(self) -> None:
        """Count one more unit as done."""
        self._progress.advance(self._task)

    def update(self, done: float, total: float | None) -> None:
        """Set the number of units that are done, and their total, None if unknown."""
        self._progress.update(self._task, completed=done, total=total)

    def print(self, line: str) -> None:
        """Print a line above the bar, also where the bar itself is not shown."""
        self._progress.console.print(line, markup=False, highlight=False)


@contextmanager
def progress_bar(unit: str, total: float | None = None, *, text: str = "", shown: bool = True) -> Iterator[ProgressBar]:
    """Show a progress bar while the block runs.

    Args:
        unit: plural noun behind the count, for example "shards".
        total: number of units; None: unknown.
        text: first description.
        shown: False on ranks other than 0.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    terminal = console(stderr=True)
    # No markup: names of datasets may hold brackets.
    description = TextColumn("{task.description}", markup=False)
    times = TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()
    columns = BarColumn(), MofNCompleteColumn(), TextColumn(unit), *times, description
    hidden = not (shown and terminal.is_terminal)
    with Progress(*columns, console=terminal, transient=True, disable=hidden, speed_estimate_period=3600) as progress:
        yield ProgressBar(progress, progress.add_task(text, total=total))


@contextmanager
def writing(path: Path, option: str = "--out", remedy: str = "give another place") -> Iterator[None]:
    """Report a failure to write as bad input.

    Raises:
        UserError: the block raised OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror or error}; {remedy}") from None


def make_folder(path: Path, option: str = "--out", *, empty: bool = False) -> None:
    """Make a folder for results before hours of work.

    Args:
        empty: refuse a folder that holds files.

    Raises:
        UserError: the folder cannot be made, or is not empty.
    """
    with writing(path, option, "give another folder"):
        path.mkdir(parents=True, exist_ok=True)
    if empty and any(path.iterdir()):
        raise UserError(f"{option} {path} is not empty; give another folder")


def check_file(path: Path | None, option: str) -> None:
    """Check before the work that a file can be written afterwards.

    Raises:
        UserError: its folder is missing or read-only, or the path is a folder.
    """
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UserError(f"{option} {path} cannot be written; give a file in a folder that exists and is writable")


def write_json(path: Path, tree: object) -> None:
    """Write the metrics that `--json` asks for.

    Raises:
        UserError: the file cannot be written.
    """
    from mmssl.files import write_json as write

    with writing(path, "--json", "give another file"):
        write(path, tree)


def load_model(name: str, device: str | None, precision: Precision = "fp32", *, show_notes: bool = False) -> "Model":
    """Load a model onto a device.

    Args:
        precision: number format of the towers; `auto` is measured, once for all processes.
        show_notes: print how weights of another library were converted.

    Raises:
        UserError: the model or the device does not exist.
    """
    from mmssl.inference import load

    model = load(name).to(parse_device(device))
    set_precision(model, precision)
    for note in model.notes if show_notes else ():
        print(note)
    return model


def set_precision(model: "Model", precision: Precision) -> None:
    """Let the towers compute in a number format; `auto` is measured, once for all processes."""
    if precision == "auto":
        from mmssl.distributed import current_world
        from mmssl.precision import choose_precision

        model.precision = current_world().broadcast(choose_precision(model.device.type).precision)
    else:
        model.precision = precision


def parse_device(device: str | None) -> str:
    """The device of `--device`; without it, the GPU of this rank, or the CPU.

    Raises:
        UserError: the device does not exist.
    """
    import torch

    if device is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


def open_cache(model: "Model", folder: Path | None, disabled: bool) -> "feature_cache.FeatureCache | None":
    """The cache of a model's image features, None if disabled.

    Raises:
        UserError: its folder cannot be written.
    """
    from mmssl.evaluate import feature_cache

    if disabled:
        return None
    place = feature_cache.default_folder() if folder is None else folder
    with writing(place, "--cache", "give another, or --no-cache"):
        place.mkdir(parents=True, exist_ok=True)
    return feature_cache.FeatureCache(place, model.fingerprint())


def open_datasets(
    data: Sequence[str], *, languages: Sequence[str] | None = None, bad_samples: float = 0.1, **options: Any
) -> "dict[str, datasets.Dataset]":
    """Open the datasets of the command line; returns them by name.

    Args:
        languages: open each dataset once per language.
        bad_samples: largest fraction of unusable images in a folder or table.
        options: classnames, templates, label and slice_by of `open_dataset`.

    Raises:
        UserError: a dataset or one of its files is missing or wrong, or two datasets have the same name.
    """
    from mmssl.evaluate import datasets, open_dataset

    found: dict[str, datasets.Dataset] = {}
    for spec, language in itertools.product(data, languages or (None,)):
        images = datasets.open_images(spec, language=language, bad_samples=bad_samples, **options)
        places = datasets.find_datasets(spec).items() if images is None and Path(spec).is_dir() else [(None, spec)]
        for name, place in places:
            dataset = images or open_dataset(place, name=name, language=language, **options)
            if dataset.name in found:
                raise UserError(f"two datasets are named {dataset.name!r}; evaluate them with two commands")
            found[dataset.name] = dataset
    return found


def split_words(given: Sequence[str] | None) -> list[str]:
    """The words of a repeated option, which may also be separated by commas, each once."""
    words = [word.strip() for words in given or () for word in words.split(",")]
    return list(dict.fromkeys(word for word in words if word))


def parse_tasks(dataset: "datasets.Dataset", given: Sequence[str] | None) -> list[str]:
    """The tasks of `--task`, each once, or the dataset's default task.

    Raises:
        UserError: a task is unknown, or the dataset lacks data that it needs.
    """
    from mmssl.evaluate import suite
    from mmssl.evaluate.tasks import find_task

    tasks = split_words(given) or [suite.default_task(dataset)]
    for task in tasks:
        find_task(task).ready(dataset)
    return tasks


def cut_model(model: "Model", dim: int | None) -> "Model":
    """The model, or its first `dim` dimensions."""
    return model if dim is None else model.first_dimensions(dim)


def print_dimensions(results: "Mapping[str, Metrics]") -> None:
    """Print one row per metric of `NAME/TASK@D`, with a column for each D."""
    from rich.table import Column, Table
    from rich.text import Text

    from mmssl.evaluate import console as metrics_text

    dims = list(dict.fromkeys(key.rpartition("@")[2] for key in results))
    names = list(dict.fromkeys(key.rpartition("@")[0] for key in results))
    table = Table(Column("dataset / task", overflow="fold"), "metric", *(f"{dim} dims" for dim in dims))
    for name in names:
        columns = [dict(row[:2] for row in metrics_text.format_metrics(results[f"{name}@{dim}"])) for dim in dims]
        metrics = dict.fromkeys(metric for column in columns for metric in column)
        for place, metric in enumerate(metrics):
            cells = (Text(column.get(metric, "")) for column in columns)
            table.add_row(Text(name if place == 0 else ""), Text(metric), *cells)
    stdout().print(table)


def print_results(results: "Mapping[str, Metrics]") -> None:
    """Print a table per evaluation: each metric with its interval, and its value without the image."""
    from rich.table import Column, Table
    from rich.text import Text

    from mmssl.evaluate import console as metrics_text

    if not results:
        return
    for name, metrics in results.items():
        rows = metrics_text.format_metrics(metrics)
        # Fixed, for rich takes from minimal widths too, and then cuts what is beyond the terminal.
        widths = [min(most, max((len(row[place]) for row in rows), default=0)) for place, most in ((0, 27), (2, 19))]
        table = Table(
            Column("metric", width=max(6, widths[0]), overflow="fold"),
            Column("value", no_wrap=True),
            Column("95 % interval", width=max(13, widths[1]), overflow="fold"),
            Column("without the image", overflow="fold"),
            # As Text: names of datasets and groups may hold brackets, which would be markup.
            title=Text(name, style="bold"),
            title_justify="left",
        )
        for row in rows:
            table.add_row(*map(Text, row))
        stdout().print(table)
    for name, metrics in results.items():
        if "note" in metrics:
            stdout().print(Text(f"{name}: {metrics['note']}"))
