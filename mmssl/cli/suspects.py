"""`mmssl shards suspects` and `mmssl shards correct`: wrong captions and labels, found and corrected."""

from pathlib import Path
from typing import Annotated

import typer

from mmssl.cli.common import Device, ModelName, load_model, progress_bar, status, writing
from mmssl.cli.shards import Patterns, shards_app
from mmssl.errors import UserError

TABLE, SHEET = "suspects.csv", "suspects.png"


@shards_app.command("suspects")
def suspects(
    model: ModelName,
    patterns: Patterns,
    out: Annotated[Path, typer.Option(help=f"Folder for {TABLE} and {SHEET}.")],
    count: Annotated[int, typer.Option(min=1, help="Samples in the table.")] = 200,
    shown: Annotated[int, typer.Option(min=1, help="Samples on the sheet.")] = 48,
    caption: Annotated[str, typer.Option("--caption-field", help="Field with the caption.")] = "txt",
    label: Annotated[
        str | None,
        typer.Option("--label-field", help="Field with the label. Default: label or cls, if every sample has it."),
    ] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest images whose labels are compared.")] = 10,
    device: Device = None,
) -> None:
    """Find samples whose caption or label is probably wrong, with a model.

    A sample is suspicious if other captions fit its image better than its own, and if the most similar images have
    another label. The worst are drawn on a sheet and listed in a table. Correct captions and labels in the table, write
    no under keep for samples to leave out, and then run: mmssl shards correct

    Example: mmssl shards suspects runs/mine '/data/pairs/*.tar' --out suspects
    """
    from mmssl.apps.suspects import scan, sheet, write_table
    from mmssl.data import expand

    names = expand(patterns)
    loaded = load_model(model, device)
    with status("encoding") as spinner:
        found = scan(
            loaded,
            names,
            caption,
            label,
            neighbours=neighbours,
            progress=lambda work, done: spinner.update(f"{done:,} {work}"),
        )
    fields = list(dict.fromkeys([caption, *([] if found.label is None else [found.label])]))
    with writing(out, remedy="pick another folder"):
        out.mkdir(parents=True, exist_ok=True)
        write_table(out / TABLE, found.suspects[:count], found.samples, fields)
        sheet(found, caption, shown).save(out / SHEET)
    for rank, suspect in enumerate(found.suspects[:5], start=1):
        sample = found.samples[suspect.row]
        print(f"{rank}. {sample.shard}:{sample.key}: {str(sample.fields[caption])[:60]!r}")
        label = None if found.label is None else str(sample.fields[found.label])
        said = "" if label == suspect.neighbours_label else f"; label {label}, neighbours {suspect.neighbours_label}"
        print(f"   {suspect.better_captions:.0%} of other captions fit better{said}")
    print(f"{len(found.samples):,} samples ranked, {len(found.bad):,} could not be used")
    print(f"look at {out / SHEET} and correct {out / TABLE}, then:")
    print(f"mmssl shards correct SHARDS --table {out / TABLE} --out NEW")


@shards_app.command("correct")
def correct(
    patterns: Patterns,
    table: Annotated[Path, typer.Option(help="Corrected table of mmssl shards suspects.")],
    out: Annotated[Path, typer.Option(help="Folder for the corrected shards; it must hold none of their names.")],
) -> None:
    """Write copies of shards with the captions and labels of a corrected table, without the samples marked no.

    Everything else is copied byte for byte.

    Example: mmssl shards correct '/data/pairs/*.tar' --table suspects/suspects.csv --out corrected
    """
    from mmssl.apps.suspects import read_table
    from mmssl.data import expand
    from mmssl.data.packing import correct as corrections

    names = expand(patterns)
    rows = read_table(table)
    with progress_bar("shards", text="correcting") as bar:
        done = corrections.correct_shards(names, rows, out, bar.update)
    print(f"{done.changed:,} samples corrected, {done.dropped:,} left out, {done.unchanged:,} copied as they were")
    print(f"train on them with data.train='{out}/*.tar'")
    if not done.changed + done.unchanged:
        raise UserError("no sample is left; keep some of them")
