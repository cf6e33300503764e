"""`mmssl compare`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    progress_bar,
    verb,
    write_json,
)
from mmssl.errors import UserError


@verb(40)
def compare(
    first: Annotated[str, typer.Argument(help="Run or model folder.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    data: Data,
    task: Tasks = None,
    classnames: Classnames = None,
    templates: Templates = None,
    label: Label = None,
    json_file: JsonFile = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the tables of both models: first/ and second/.")] = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    batch_size: BatchSize = 256,
    bad_samples: BadSamples = 0.1,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Evaluate two models on the same samples and test which differences are real.

    Differences are paired by sample, with bootstrap intervals. A difference is called real if its test (McNemar or
    sign flips) is significant at 5 % after Holm's correction for the number of metrics.
    """
    from mmssl.distributed import process_group
    from mmssl.evaluate import compare as comparison
    from mmssl.evaluate import console, suite

    datasets = open_datasets(data, bad_samples=bad_samples, classnames=classnames, templates=templates, label=label)
    plan = {name: (dataset, _check_paired(parse_tasks(dataset, task))) for name, dataset in datasets.items()}
    if json_file is not None:
        make_folder(json_file.absolute().parent, "--json in")
    with process_group() as world, _result_folder(out) as folder:
        places = [folder / "first", folder / "second"]
        total = 2 * sum(len(tasks) for _, tasks in plan.values())
        with progress_bar("evaluations", total, text="starting", shown=world.rank == 0) as bar:
            for name, place in zip((first, second), places, strict=True):
                model = load_model(name, device, precision)
                suite.run(
                    model,
                    plan,
                    place,
                    suite.SuiteOptions(
                        batch_size=batch_size,
                        bad_samples=bad_samples,
                        logit_scale=model.logit_scale,
                        draw=False,
                        cache=open_cache(model, cache, no_cache),
                        world=world,
                        progress=bar.describe,
                        finished=lambda key, metrics: bar.advance(),
                    ),
                )
        if world.rank == 0:
            found = comparison.compare_results(*places)
            print(f"first: {first}\nsecond: {second}\n\n{console.format_differences(found)}\n")
            print("\n".join(comparison.verdicts(found, first, second)))
            if json_file is not None:
                write_json(json_file, comparison.to_json(found))


def _check_paired(tasks: list[str]) -> list[str]:
    """The tasks, once it is certain that each records an outcome per sample."""
    from mmssl.evaluate.tasks import find_task, paired_tasks

    for task in tasks:
        if not find_task(task).paired:
            raise UserError(
                f"task {task!r} records no outcome per sample, so it cannot be paired; "
                f"use --task {', '.join(paired_tasks())}"
            )
    return tasks


@contextmanager
def _result_folder(out: Path | None) -> Iterator[Path]:
    """The folder for results, or a temporary one."""
    if out is not None:
        make_folder(out)
        yield out
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
