"""`mmssl train`: by a configuration, or on data in any form with settings that suit them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmssl import system
from mmssl.cli.evaluate import print_results
from mmssl.config import Config, load_config, parse_override, read_tree
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.train.trainer import Finished

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the configuration, for example optim.lr=1e-3 train.steps=100.",
    ),
]


def train(
    config: Annotated[str | None, typer.Argument(help="A YAML file, for example configs/quickstart.yaml.")] = None,
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images with captions beside them, a CSV, TSV, JSONL or Parquet table, or shards. "
            "Without CONFIG, settings are chosen for these pairs and this machine, and printed with their reasons."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="With --data: a whole model to start from, as open_clip:MODEL/TAG or a run."
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="With --data: the folder of the run. Default: runs/NAME, by the data's name.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with this run from its newest checkpoint; KEY=VALUE may change settings."),
    ] = None,
    rewind: Annotated[
        bool,
        typer.Option(
            "--rewind",
            help="With --resume, after a stop at losses that were not finite: go back to the last checkpoint "
            "before them, and leave their data out.",
        ),
    ] = False,
) -> None:
    """Train a dual encoder: `mmssl train --data pairs.csv`, `mmssl train CONFIG` or `mmssl train --resume RUN`.

    Each may be followed by [KEY=VALUE]... On many processes:
    accelerate launch --num_processes N -m mmssl.train CONFIG [KEY=VALUE]...
    """
    changes = list(overrides or [])
    if config is not None and (resume is not None or _is_change(config)):
        changes.insert(0, config)  # the first word was an override, not a file
        config = None
    if rewind and resume is None:
        raise UserError("--rewind needs the run to go back in: mmssl train --resume RUN --rewind")
    if data is None and (start is not None or run is not None):
        option = f"--start {start}" if start is not None else f"--run {run}"
        raise UserError(f"{option} goes with --data; with a configuration give model.start=MODEL, run_dir=RUN")
    if data is not None and resume is not None:
        raise UserError(f"--data and --resume are both given; {resume} knows its data: leave --data out")
    if data is not None:
        _report(_on_data(data, config, changes, start, run))
    else:
        _report(_by_configuration(config, changes, resume, rewind))


def _by_configuration(config: str | None, changes: list[str], resume: Path | None, rewind: bool) -> "Finished":
    from mmssl.apps.autoconfig.training import after_training
    from mmssl.train.trainer import train as run

    finished = run(_settings(config, changes, resume), resume=resume is not None, rewind=rewind)
    after_training(finished)
    return finished


def _settings(config: str | None, changes: list[str], resume: Path | None) -> Config:
    if resume is not None:
        if not (resume / "config.yaml").is_file():
            again = "; its packing was interrupted: repeat the command that began it" if _is_packed(resume) else ""
            raise UserError(f"{resume} is not a run: it has no config.yaml{again}")
        return load_config(resume / "config.yaml", [*changes, f"run_dir={resume}"])
    if config is None:
        raise UserError(
            "give pairs (mmssl train --data pairs.csv), a configuration (mmssl train configs/quickstart.yaml) "
            "or a run (mmssl train --resume RUN)"
        )
    return load_config(config, changes)


def _on_data(data: str, config: str | None, changes: list[str], start: str | None, run: Path | None) -> "Finished":
    from mmssl.apps.autoconfig.training import start_from, train_on

    pinned = dict(parse_override(change) for change in changes)
    if config is not None:
        if start is not None:
            pinned["model.start"] = start
        return train_on(data, run, tree=read_tree(config), pinned=pinned)
    start = pinned.pop("model.start", start)
    return train_on(data, run, start=None if start is None else start_from(start), pinned=pinned)


def _report(finished: "Finished") -> None:
    """Figures, where the model is, and what to do with it."""
    from mmssl.apps.autoconfig.training import next_commands

    if system.rank() == 0:
        print_results(finished.results)
        if finished.signal is None:
            print(f"model: {finished.run_dir / 'model'}")
            print("next:", *next_commands(finished.run_dir), sep="\n  ")
    if finished.signal is not None:
        print(
            f"stopped by signal {finished.signal}; go on with: mmssl train --resume {finished.run_dir}",
            file=sys.stderr,
        )
        raise typer.Exit(128 + finished.signal)


def _is_change(word: str) -> bool:
    try:
        return "=" in word and not Path(word).is_file()
    except OSError:  # too long for a file's name
        return True


def _is_packed(run: Path) -> bool:
    from mmssl.train.setup import PACKED

    return (run / PACKED).is_dir()
