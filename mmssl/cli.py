"""The `mmssl` command: each verb calls one function of the rooms below."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mmssl.cli_ablate import ablate
from mmssl.cli_bench import bench_app
from mmssl.cli_compare import compare
from mmssl.cli_doctor import doctor
from mmssl.cli_eval import evaluate, print_results
from mmssl.cli_report import add_reports
from mmssl.cli_serve import serve
from mmssl.cli_shards import shards_app
from mmssl.cli_use import add_use
from mmssl.config import load_config
from mmssl.types import UserError

app = typer.Typer(
    help="Train image-text dual encoders on WebDataset shards, judge them, and use them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tokenizer_app = typer.Typer(help="Tokenizers for text towers.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.command("eval")(evaluate)
app.command()(compare)
app.command()(ablate)
app.command()(doctor)
app.command()(serve)
app.add_typer(shards_app, name="shards")
app.add_typer(bench_app, name="bench")
add_reports(app, bench_app)
add_use(app, bench_app)

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
        print_results(finished.results)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="mmssl")
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        # Other processes may wait for this one in a collective: end without their consent.
        sys.exit(2)
