"""`mmssl tokenizer train`."""

from pathlib import Path
from typing import Annotated

import typer

from mmssl.cli.common import group

tokenizer_app = group(200, "tokenizer", "Tokenizers for text towers.")


@tokenizer_app.command("train")
def train_tokenizer(
    shards: Annotated[list[str], typer.Argument(help="Shards with the captions to train on: paths or patterns.")],
    out: Annotated[Path, typer.Option(help="Folder to write; set model.text.tokenizer to it.")],
    vocab_size: Annotated[int, typer.Option(help="Largest vocabulary.")] = 30_522,
    captions: Annotated[
        list[str] | None, typer.Option(help="Caption templates, for example '{label}: {tags}'.")
    ] = None,
    lowercase: Annotated[
        bool, typer.Option(help="Read captions in lower case, so that Dog and dog are one word.")
    ] = True,
) -> None:
    """Train a byte-level BPE tokenizer on the captions of shards. It keeps every letter and mark of every script.

    Example: mmssl tokenizer train '/data/pairs/*.tar' --out tokenizer/
    """
    from mmssl.build import train_tokenizer_on
    from mmssl.data import expand

    tokenizer = train_tokenizer_on(
        expand(shards), captions or ["{txt}"], vocab_size, max_tokens=77, lowercase=lowercase
    )
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size} tokens")
