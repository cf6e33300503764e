"""`mmssl eval`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmssl.cli.common import (
    BadSamples,
    BatchSize,
    Cache,
    Classnames,
    Device,
    JsonFile,
    Label,
    NoCache,
    OptionalData,
    Precision,
    Tasks,
    Templates,
    load_model,
    make_folder,
    open_cache,
    open_datasets,
    parse_tasks,
    print_dimensions,
    print_results,
    progress_bar,
    split_words,
    verb,
    write_json,
)
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.evaluate import Metrics, datasets
    from mmssl.evaluate.published import Published

SliceBy = Annotated[
    list[str] | None,
    typer.Option(
        help="Metadata field (a key of the JSON member) to break accuracies down by; repeat, or separate by commas."
    ),
]
Language = Annotated[
    list[str] | None,
    typer.Option(help="Use classnames.LANGUAGE.txt and the templates of that language; repeat."),
]
Shift = Annotated[
    list[str] | None,
    typer.Option(help="A:B, two datasets with the same classes: report the drop in accuracy from A to B; repeat."),
]


@verb(30, "eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Run or model folder.")],
    data: OptionalData = None,
    suite_name: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="Published suite (mmssl suites), such as vtab+: its test splits are downloaded into the cache of the "
            "Hugging Face hub, tens of GB for the large ones, and evaluated beside DATA.",
        ),
    ] = None,
    task: Tasks = None,
    slice_by: SliceBy = None,
    classnames: Classnames = None,
    templates: Templates = None,
    language: Language = None,
    label: Label = None,
    shift: Shift = None,
    dims: Annotated[
        str | None,
        typer.Option(
            metavar="D,D,...",
            help="Evaluate the first D dimensions of the embeddings for each D, in one table: 512,256,128.",
        ),
    ] = None,
    json_file: JsonFile = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tables and plots.")] = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    batch_size: BatchSize = 256,
    bad_samples: BadSamples = 0.1,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Evaluate a model on datasets. docs/evaluation.md explains each task.

    To share the images among processes: torchrun --nproc_per_node N -m mmssl eval MODEL DATA..., or
    accelerate launch --num_processes N -m mmssl eval MODEL DATA...
    """
    from mmssl.apps.report import card_beside
    from mmssl.distributed import process_group
    from mmssl.evaluate import compare, suite

    options = {"classnames": classnames, "templates": templates, "label": label, "slice_by": split_words(slice_by)}
    datasets = open_datasets(data or (), languages=language, bad_samples=bad_samples, **options)
    published = _open_suite(suite_name, datasets, options)
    if not datasets:
        raise UserError("nothing to evaluate; give DATA or --suite NAME (mmssl suites lists them)")
    plan = {name: (dataset, parse_tasks(dataset, task)) for name, dataset in datasets.items()}
    pairs = compare.parse_shifts(shift or (), datasets)
    numbers = _parse_dims(dims)
    if numbers and pairs:
        raise UserError("--shift compares embeddings with all dimensions; leave out --dims")
    if out is not None:
        make_folder(out)
    if json_file is not None:
        make_folder(json_file.absolute().parent, "--json in")
    card = card_beside(Path(model), out)
    with process_group() as world:
        loaded = load_model(model, device, precision)
        total = sum(len(tasks) for _, tasks in plan.values()) * max(1, len(numbers))
        with progress_bar("evaluations", total, text="starting", shown=world.rank == 0) as bar:
            results = suite.run(
                loaded,
                plan,
                out,
                suite.SuiteOptions(
                    batch_size=batch_size,
                    bad_samples=bad_samples,
                    logit_scale=loaded.label_scale,
                    logit_curve=loaded.label_curve,
                    cache=open_cache(loaded, cache, no_cache),
                    dims=numbers,
                    world=world,
                    progress=bar.describe,
                    finished=lambda name, metrics: bar.advance(),
                ),
            )
        if world.rank == 0:
            results |= compare.measure_shifts(results, pairs)
            (print_dimensions if numbers else print_results)(results)
            if published:
                print(_mean_line(str(suite_name), published, results))
            if json_file is not None:
                write_json(json_file, results)
            if card is not None:
                print(card.renewed())


def _open_suite(
    name: str | None, found: "dict[str, datasets.Dataset]", options: Mapping[str, Any]
) -> "dict[str, Published]":
    """Download a suite and add its datasets to the others; returns its entries by the names of their datasets."""
    from mmssl.evaluate import open_dataset
    from mmssl.evaluate.published import download, find_suite

    entries = {} if name is None else {one.name.replace("/", "-"): one for one in find_suite(name).sets}
    with progress_bar("datasets", len(entries), text="downloading", shown=bool(entries)) as bar:
        for own, entry in entries.items():
            if own in found:
                raise UserError(f"two datasets are named {own!r}; evaluate them with two commands")
            found[own] = open_dataset(download(entry), name=own, **options)
            bar.advance()
    return entries


def _mean_line(name: str, published: "Mapping[str, Published]", results: "Mapping[str, Metrics]") -> str:
    """The mean over a suite of each dataset's metric, as far as it was measured."""
    values = [
        metrics[entry.metric]
        for own, entry in published.items()
        for key, metrics in results.items()
        if key.rpartition("/")[0] == own and entry.metric in metrics
    ]
    measured = f"{sum(values) / len(values):.4f}" if values else "not measured"
    return f"{name}: mean of {len(values)} of {len(published)} datasets: {measured}"


def _parse_dims(text: str | None) -> tuple[int, ...]:
    """The numbers of `512,256`."""
    words = [word.strip() for word in text.split(",")] if text else []
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--dims {text!r}: give whole numbers with commas in between, for example 512,256,128")
    return tuple(dict.fromkeys(map(int, words)))
