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
from mmssl.cli_eval import evaluate
from mmssl.cli_finetune import add_finetune
from mmssl.cli_predict import predict
from mmssl.cli_report import add_reports
from mmssl.cli_serve import serve
from mmssl.cli_shards import shards_app
from mmssl.cli_train import Overrides, train
from mmssl.cli_use import add_use
from mmssl.config import load_config
from mmssl.types import UserError

app = typer.Typer(
    help="Train image-text dual encoders on pictures with captions, judge them, and use them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tokenizer_app = typer.Typer(help="Tokenizers for text towers.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.command()(train)
app.command()(predict)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(ablate)
app.command()(doctor)
app.command()(serve)
app.add_typer(shards_app, name="shards")
app.add_typer(bench_app, name="bench")
add_reports(app, bench_app)
add_use(app, bench_app)
add_finetune(app)


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
