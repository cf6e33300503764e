"""`mmssl eval`."""

from pathlib import Path
from typing import Annotated

import typer

from mmssl.cli.common import (
    BadSamples,
    BatchSize,
    Cache,
    Classnames,
    Data,
    Device,
    JsonFile,
    Label,
    NoCache,
    Precision,
    Tasks,
    Templates,
    load_model,
    make_folder,
    open_cache,
    open_datasets,
    parse_tasks,
    print_results,
    progress_bar,
    split_words,
    verb,
    write_json,
)

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
    datasets = open_datasets(data, languages=language, bad_samples=bad_samples, **options)
    plan = {name: (dataset, parse_tasks(dataset, task)) for name, dataset in datasets.items()}
    pairs = compare.parse_shifts(shift or (), datasets)
    if out is not None:
        make_folder(out)
    if json_file is not None:
        make_folder(json_file.absolute().parent, "--json in")
    card = card_beside(Path(model), out)
    with process_group() as world:
        loaded = load_model(model, device, precision)
        total = sum(len(tasks) for _, tasks in plan.values())
        with progress_bar("evaluations", total, text="starting", shown=world.rank == 0) as bar:
            results = suite.run(
                loaded,
                plan,
                out,
                suite.SuiteOptions(
                    batch_size=batch_size,
                    bad_samples=bad_samples,
                    logit_scale=loaded.logit_scale,
                    cache=open_cache(loaded, cache, no_cache),
                    world=world,
                    progress=bar.describe,
                    finished=lambda name, metrics: bar.advance(),
                ),
            )
        if world.rank == 0:
            results |= compare.measure_shifts(results, pairs)
            print_results(results)
            if json_file is not None:
                write_json(json_file, results)
            if card is not None:
                print(card.renewed())
