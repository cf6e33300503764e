"""The `mmssl` command: each verb calls one function of the rooms below."""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer

from mmssl.cli.ablate import ablate
from mmssl.cli.compare import compare
from mmssl.cli.doctor import doctor
from mmssl.cli.evaluate import evaluate
from mmssl.cli.explain import add_reports
from mmssl.cli.finetune import add_finetune
from mmssl.cli.predict import predict
from mmssl.cli.search import add_use
from mmssl.cli.serve import serve
from mmssl.cli.shards import shards_app
from mmssl.cli.train import Overrides, train
from mmssl.config import load_config
from mmssl.errors import UserError
from scripts.bench.__main__ import bench_app

app = typer.Typer(
    help="Train image-text dual encoders on images with captions, judge them, and use them.",
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
    from mmssl.cli.show import describe

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
    from mmssl.build import train_tokenizer_on
    from mmssl.data import expand

    tokenizer = train_tokenizer_on(expand(shards), captions or ["{txt}"], vocab_size, max_tokens=77)
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size} tokens")


REMEDIES = {
    errno.EACCES: "change its permissions, or give another place",
    errno.EPERM: "change its permissions, or give another place",
    errno.EROFS: "give another place",
    errno.ENOSPC: "free some space, or give another place",
    errno.EDQUOT: "free some space, or give another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "give another place",
    errno.EISDIR: "give a file",
    errno.EMFILE: "raise the limit of open files: ulimit -n 65536",
}
"""What can be done about the system's refusals that no verb foresaw."""
# typer has its own copy of click since 0.26, where this class has no public name.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.exit(app(args=words, prog_name="mmssl", standalone_mode=False))
    except UserError as error:
        _fail(str(error))
    except UsageError as error:
        _fail(_misused(error))
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        place = "a file" if error.filename is None else error.filename
        _fail(f"{place} cannot be used: {error.strerror}; {REMEDIES[error.errno]}")


def _misused(error: Any) -> str:
    """Words that are no command: what is wrong with them, and where the right ones stand."""
    words = error.format_message()
    if words.startswith("Usage:"):  # a verb without any word shows its help
        print(words, file=sys.stderr)
        sys.exit(2)
    return f"{words[:1].lower()}{words[1:].rstrip('.')}; see: {error.ctx.command_path} --help"


def _fail(line: str) -> NoReturn:
    """Say what is wrong and end, also where other processes wait for this one in a collective."""
    rank = os.environ.get("RANK", "0")
    print(f"error{'' if rank == '0' else f' (process {rank})'}: {line}", file=sys.stderr)
    sys.exit(2)
