"""The `mmssl` command: each verb calls one function of the rooms below."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmssl.cli_ablate import ablate
from mmssl.cli_bench import bench_app
from mmssl.cli_shards import shards_app
from mmssl.config import load_config
from mmssl.evaluate.tables import Metrics
from mmssl.types import UserError

app = typer.Typer(
    help="Train image-text dual encoders on WebDataset shards, judge them, and use them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tokenizer_app = typer.Typer(help="Tokenizers for text towers.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.command()(ablate)
app.add_typer(shards_app, name="shards")
app.add_typer(bench_app, name="bench")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the configuration, for example optim.lr=1e-3 train.steps=100.",
    ),
]


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(help="A YAML file, for example configs/quickstart.yaml.")] = None,
    overrides: Overrides = None,
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
    """Train a dual encoder: `mmssl train CONFIG [KEY=VALUE]...` or `mmssl train --resume RUN`.

    On many processes: accelerate launch --num_processes N -m mmssl.train CONFIG [KEY=VALUE]...
    """
    from mmssl.train.engine import train as run

    changes = list(overrides or [])
    if rewind and resume is None:
        raise UserError("--rewind needs the run to go back in: mmssl train --resume RUN --rewind")
    if resume is not None:
        # With --resume the first word, if any, is an override, not a file.
        changes = [config, *changes] if config is not None else changes
        if not (resume / "config.yaml").is_file():
            raise UserError(f"{resume} is not a run: it has no config.yaml")
        settings = load_config(resume / "config.yaml", [*changes, f"run_dir={resume}"])
    elif config is None:
        raise UserError("give a configuration, for example: mmssl train configs/quickstart.yaml, or --resume RUN")
    else:
        settings = load_config(config, changes)
    finished = run(settings, resume=resume is not None, rewound=rewind)
    if int(os.environ.get("RANK", "0")) == 0:
        _print_results(finished.results)
        if finished.signal is None:
            print(f"model: {finished.run_dir / 'model'}")
    if finished.signal is not None:
        print(
            f"stopped by signal {finished.signal}; go on with: mmssl train --resume {finished.run_dir}",
            file=sys.stderr,
        )
        raise typer.Exit(128 + finished.signal)


@app.command()
def show(
    config: Annotated[str, typer.Argument(help="A YAML file.")],
    overrides: Overrides = None,
) -> None:
    """Print the resolved configuration, parameter counts, length and learning-rate curve; needs no data and no GPU."""
    from mmssl.describe import describe

    print(describe(load_config(config, overrides or [])))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run or a model folder.")],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Data sets: folders in CLIP_benchmark's WebDataset layout, folders of such, patterns of shards.",
        ),
    ],
    task: Annotated[
        str | None, typer.Option(help="zero_shot or retrieval. Default: what the data set is made for.")
    ] = None,
    classnames: Annotated[
        str | None,
        typer.Option(help="File of class names, one a line, or 'imagenet', instead of the data set's own."),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(help="File of prompt templates with {c}, or 'openai-imagenet', instead of the data set's own."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="JSON field that holds the class, for shards without .cls members.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tables and pictures.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")] = None,
) -> None:
    """Judge a model: zero-shot classification and image-text retrieval."""
    import torch

    from mmssl.evaluate import suite
    from mmssl.evaluate.datasets import find_datasets, open_dataset
    from mmssl.model import load

    datasets = {}
    for spec in data:
        for name, place in find_datasets(spec).items() if Path(spec).is_dir() else [(None, spec)]:
            dataset = open_dataset(place, name=name, classnames=classnames, templates=templates, label=label)
            if dataset.name in datasets:
                raise UserError(f"two data sets are named {dataset.name!r}; judge them by two commands")
            datasets[dataset.name] = dataset
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}; pick another folder") from None
    judged = load(model).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with Console(stderr=True).status("evaluating") as status:
        results = suite.run(
            judged,
            {name: (d, task or suite.default_task(d)) for name, d in datasets.items()},
            out,
            logit_scale=judged.logit_scale,
            progress=lambda what, done: status.update(f"{what} {done}"),
        )
    _print_results(results)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(results, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {json_file}: {error.strerror}") from None


@tokenizer_app.command("train")
def train_tokenizer(
    shards: Annotated[list[str], typer.Argument(help="Shards whose captions to learn from: paths or patterns.")],
    out: Annotated[Path, typer.Option(help="Folder to write; name it in model.text.tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Largest vocabulary.")] = 30_522,
    captions: Annotated[
        list[str] | None, typer.Option(help="Caption templates, for example '{label}: {tags}'.")
    ] = None,
) -> None:
    """Learn a WordPiece tokenizer from the captions of shards."""
    from mmssl.build import learn_tokenizer
    from mmssl.data.patterns import expand

    tokenizer = learn_tokenizer(expand(shards), captions or ["{txt}"], vocab_size, max_tokens=77)
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size} tokens")


def _print_results(results: Mapping[str, Metrics]) -> None:
    """One row a figure, with its bootstrap interval where there is one."""
    if not results:
        return
    table = Table("data set / task", "figure", "value", "95 % interval")
    for name, figures in results.items():
        intervals = figures.get("intervals", {})
        shown = [(k, v) for k, v in figures.items() if isinstance(v, int | float)]
        for i, (figure, value) in enumerate(shown):
            low_high = intervals.get(figure) if isinstance(intervals, dict) else None
            interval = "" if low_high is None else f"{low_high[0]:.4f} - {low_high[1]:.4f}"
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
            table.add_row(name if i == 0 else "", figure, text, interval)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="mmssl")
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        # Other processes may wait for this one in a collective: end without their consent.
        sys.exit(2)
