"""`mmssl train`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmssl.cli.common import CaptionColumn, Encoding, ImageColumn, Overrides, Separator, print_results, verb
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.config import Config
    from mmssl.train import Finished


@verb(10)
def train(
    config: Annotated[str | None, typer.Argument(help="YAML file, for example configs/quickstart.yaml.")] = None,
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of images with captions beside them, CSV, TSV, JSONL or Parquet table, or shards. "
            "Without CONFIG, mmssl chooses settings for the data and the machine, and prints the reasons."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="With --data: model to start from, open_clip:MODEL/TAG or a run."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="With --data: folder of the run. Default: runs/NAME, after the data.")
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    separator: Separator = None,
    encoding: Encoding = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run to resume from its newest checkpoint; KEY=VALUE may change settings."),
    ] = None,
    rewind: Annotated[
        bool,
        typer.Option(
            "--rewind",
            help="With --resume, after a stop at non-finite losses: restart from the last checkpoint before them, "
            "and skip the bad batches.",
        ),
    ] = False,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="With --resume: run the shell commands (pipe:) and import the modules that RUN/config.yaml names. "
            "Only for runs whose configuration you know.",
        ),
    ] = False,
) -> None:
    """Train a dual encoder: `mmssl train --data pairs.csv`, `mmssl train CONFIG` or `mmssl train --resume RUN`.

    Each form takes [KEY=VALUE]... at the end. On several GPUs:
    accelerate launch --num_processes N -m mmssl.train CONFIG [KEY=VALUE]...
    """
    changes = list(overrides or [])
    if config is not None and (resume is not None or _is_change(config)):
        changes.insert(0, config)  # the first word was an override, not a file
        config = None
    _check_options(data, start, run, resume, rewind)
    if trust and resume is None:
        raise UserError("--trust needs a run: mmssl train --resume RUN --trust")
    table = {"image_column": image_column, "caption_column": caption_column, "separator": separator}
    table_options = _table_options(data, table | {"encoding": encoding})
    if data is not None:
        _report(_train_on_data(data, config, changes, start, run, table_options))
    else:
        settings = _read_config(config, changes) if resume is None else resumed_config(resume, changes, trust)
        _report(_train_config(settings, resume=resume is not None, rewind=rewind))


def _check_options(data: str | None, start: str | None, run: Path | None, resume: Path | None, rewind: bool) -> None:
    if rewind and resume is None:
        raise UserError("--rewind needs a run: mmssl train --resume RUN --rewind")
    if data is None and (start is not None or run is not None):
        option = f"--start {start}" if start is not None else f"--run {run}"
        raise UserError(f"{option} needs --data; with a configuration, set model.start=MODEL and run_dir=RUN")
    if data is not None and resume is not None:
        raise UserError(f"--data and --resume are both given; {resume} has its data already: leave out --data")


def _table_options(data: str | None, options: dict[str, str | None]) -> dict[str, str]:
    """The options of tables that are given."""
    given = {name: value for name, value in options.items() if value is not None}
    if data is None and given:
        option, value = next(iter(given.items()))
        raise UserError(f"--{option.replace('_', '-')} {value} needs a table: --data pairs.csv")
    return given


def _train_config(settings: "Config", *, resume: bool, rewind: bool) -> "Finished":
    from mmssl.apps.autoconfig import after_training
    from mmssl.train import train as run

    finished = run(settings, resume=resume, rewind=rewind)
    after_training(finished)
    return finished


def _read_config(path: str | None, changes: list[str]) -> "Config":
    from mmssl.config import load_config

    if path is None:
        raise UserError(
            "give pairs (mmssl train --data pairs.csv), a configuration (mmssl train configs/quickstart.yaml) "
            "or a run (mmssl train --resume RUN)"
        )
    return load_config(path, changes)


def resumed_config(run: Path, changes: list[str], trust: bool = False) -> "Config":
    """The configuration of a run to resume, with the folder in which the run is now.

    Args:
        changes: KEY=VALUE words.
        trust: accept a configuration that names shell commands or modules outside mmssl.

    Raises:
        UserError: the folder is not a run, a change is wrong, or it names code and is not trusted.
    """
    from mmssl.config import parse_config, parse_override, read_tree, set_key
    from mmssl.train import PACKED

    path = run / "config.yaml"
    if not path.is_file():
        interrupted = (run / PACKED).is_dir()
        again = "; its packing was interrupted: repeat the command that started it" if interrupted else ""
        raise UserError(f"{run} is not a run: it has no config.yaml{again}")
    tree = read_tree(path)
    for change in changes:
        set_key(tree, *parse_override(change))
    # As a value: text would be read as YAML, in which folders like 'exp #2' and 'null' mean something else.
    config = parse_config(tree | {"run_dir": str(run)}, where=str(path))
    code = [] if trust else _named_code(config)
    if code:
        raise UserError(
            f"{path} names code of its own: {', '.join(code)}; a run folder may come from elsewhere: "
            f"read the file, then add --trust to run it"
        )
    return config


def _named_code(config: "Config") -> list[str]:
    """The shell commands and the modules that a configuration names, apart from those of mmssl."""
    from mmssl.evaluate.tasks import task_names
    from mmssl.objectives import objective_names
    from mmssl.types import PipeCommand

    train = [config.data.train] if isinstance(config.data.train, str) else config.data.train
    shards = [entry if isinstance(entry, str) else entry.shards for entry in train]
    patterns = [p for spec in shards for p in ([spec] if isinstance(spec, str) else spec)]
    tasks = [task for suite in config.evaluate.suites.values() for task in suite.task]
    named = {*config.objectives, *tasks} - {*objective_names(), *task_names()}
    commands = [pattern for pattern in patterns if pattern.startswith(PipeCommand.PREFIX)]
    return [*(commands if config.data.allow_pipe else []), *sorted(name for name in named if set(name) & {".", ":"})]


def _train_on_data(
    data: str, config: str | None, changes: list[str], start: str | None, run: Path | None, table: dict[str, str]
) -> "Finished":
    from mmssl.apps.autoconfig import start_from, train_on
    from mmssl.config import parse_override, read_tree

    pinned = dict(parse_override(change) for change in changes)
    if config is not None:
        if start is not None:
            pinned["model.start"] = start
        return train_on(data, run, tree=read_tree(config), pinned=pinned, table=table)
    start = pinned.pop("model.start", start)
    return train_on(data, run, start=None if start is None else start_from(start), pinned=pinned, table=table)


def _report(finished: "Finished") -> None:
    """Print the metrics, the model folder, and commands that use the model."""
    from mmssl import system
    from mmssl.apps.autoconfig import next_commands
    from mmssl.config import load_config
    from mmssl.train import resume_command

    if system.rank() == 0:
        print_results(finished.results)
        if finished.signal is None:
            print(f"model: {finished.run_dir / 'model'}")
            print("next:", *next_commands(finished.run_dir), sep="\n  ")
    if finished.signal is not None:
        trust = " --trust" if _named_code(load_config(finished.run_dir / "config.yaml")) else ""
        command = resume_command(finished.run_dir) + trust
        print(f"stopped by signal {finished.signal}; resume with: {command}", file=sys.stderr)
        raise typer.Exit(128 + finished.signal)


def _is_change(word: str) -> bool:
    try:
        return "=" in word and not Path(word).is_file()
    except OSError:  # too long for a file's name
        return True
