"""`mmssl compare`: the verb."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mmssl.cli.evaluate import (
    BatchSize,
    Cache,
    Classnames,
    Data,
    Device,
    JsonFile,
    Label,
    NoCache,
    Tasks,
    Templates,
    find,
    load_on,
    make_folder,
    make_places,
    open_cache,
    parse_tasks,
    progress_bar,
    write_json,
)
from mmssl.errors import UserError


def compare(
    first: Annotated[str, typer.Argument(help="A run or a model folder.")],
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
    device: Device = None,
) -> None:
    """Judge two models on the same samples and say which differences are real.

    Every sample is judged by both. Intervals are of a bootstrap of these pairs; a difference is called real where its
    test leaves no more than 5 % for a false alarm among all figures together (McNemar or sign flips, Holm).
    """
    from mmssl.distributed import process_group
    from mmssl.evaluate import suite
    from mmssl.evaluate.compare import compare_results, to_json, verdicts
    from mmssl.evaluate.console import format_differences

    datasets = find(data, classnames=classnames, templates=templates, label=label)
    plan = {name: (dataset, _paired(parse_tasks(dataset, task))) for name, dataset in datasets.items()}
    make_places(None, json_file)
    with process_group() as world, _folder(out) as folder:
        places = [folder / "first", folder / "second"]
        count = 2 * sum(len(tasks) for _, tasks in plan.values())
        with progress_bar(count, world) as (tell, tick):
            for name, place in zip((first, second), places, strict=True):
                model = load_on(name, device)
                suite.run(
                    model,
                    plan,
                    place,
                    batch_size=batch_size,
                    logit_scale=model.logit_scale,
                    draw=False,
                    cache=None if no_cache else open_cache(model, cache),
                    world=world,
                    progress=tell,
                    finished=lambda key, figures: tick(),
                )
        if world.rank == 0:
            found = compare_results(*places)
            print(f"first: {first}\nsecond: {second}\n\n{format_differences(found)}\n")
            print("\n".join(verdicts(found, first, second)))
            if json_file is not None:
                write_json(json_file, to_json(found))


def _paired(tasks: list[str]) -> list[str]:
    """The tasks, all of which leave an outcome of each sample."""
    from mmssl.evaluate.compare import PAIRED_TASKS

    for task in tasks:
        if task not in PAIRED_TASKS:
            raise UserError(
                f"task {task!r} has no outcome of each sample to pair; compare by --task {', '.join(PAIRED_TASKS)}"
            )
    return tasks


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """The folder for results, or one that lasts as long as the block."""
    if out is not None:
        make_folder(out)
        yield out
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
