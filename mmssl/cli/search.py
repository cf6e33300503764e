"""`mmssl embed` and `mmssl search`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmssl.cli.common import (
    BadSamples,
    CaptionMember,
    Device,
    Dim,
    ImageMember,
    ModelName,
    Precision,
    check_file,
    cut_model,
    load_model,
    progress_bar,
    status,
    stdout,
    verb,
    writing,
)
from mmssl.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from mmssl.apps.search import Hit

Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONDITION",
        help="Only images whose field meets this: style=noto, 'year>=1900', author!=unknown, 'caption~apple' "
        "(contains); repeat for more. Fields: key, caption, shard, and those that embed stored.",
    ),
]
LARGE = 200_000
"""Images above which a graph is built by default, because an exact search would take too long."""


@verb(110)
def embed(
    model: ModelName,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Shards (paths, folders, URLs or patterns); or a table or a folder of images, with or without "
            "captions, which is packed into OUT/shards.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the index. Run the command again to resume, to add new shards, to embed changed ones anew, "
            "and to remove those that are gone."
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    dim: Dim = None,
    graph: Annotated[
        bool | None,
        typer.Option(
            "--graph/--no-graph", help="Build a graph for fast search in large sets. Default: from 200,000 images."
        ),
    ] = None,
    with_text: Annotated[
        bool,
        typer.Option(
            "--with-text",
            help="Also store the embeddings of the captions: such a folder can teach (objectives.distill.teacher).",
        ),
    ] = False,
    parquet: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write one Parquet table for other stores: shard, key, caption, fields, embedding (float32).",
        ),
    ] = None,
    faiss: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write a flat index of FAISS, whose ids are the row numbers of the table above."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float16", "int8"] | None,
        typer.Option(help="Number format of the stored embeddings; int8 takes half the space. Default: float16."),
    ] = None,
    fields: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Fields of the .json of each sample to store for search --where; '' for none. Default: all with short "
            "values.",
        ),
    ] = None,
    image_member: ImageMember = None,
    caption_member: CaptionMember = None,
    bad_samples: BadSamples = 0.1,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Store the embedding of every image, and Parquet tables of keys, captions and fields.

    To share the images among processes: torchrun --nproc_per_node N -m mmssl embed MODEL SHARDS... --out DIR, or
    accelerate launch --num_processes N -m mmssl embed MODEL SHARDS... --out DIR

    Example: mmssl embed runs/mine '/data/pairs/*.tar' --out index
    """
    import torch

    from mmssl.apps.autoconfig import resolve_shards
    from mmssl.apps.search import Index, embed_shards, write_faiss, write_parquet
    from mmssl.data import MemberNames, account_of
    from mmssl.distributed import process_group

    check_file(parquet, "--parquet")
    check_file(faiss, "--faiss")
    wanted = None if fields is None else [name.strip() for name in fields.split(",") if name.strip()]
    with process_group() as world:
        loaded = cut_model(load_model(model, device, precision, show_notes=world.rank == 0), dim)
        with status("reading"):
            shards = resolve_shards(data[0] if len(data) == 1 else data, out / "shards", need_captions=False)
        own = len(range(world.rank, len(shards), world.size))
        with progress_bar("shards", own, text="embedding", shown=world.rank == 0) as bar:

            def show(shards_done: int, images: int) -> None:
                bar.update(shards_done, own)
                bar.describe("images", images)

            done = embed_shards(
                loaded,
                shards,
                out,
                batch_size=batch_size,
                members=MemberNames.of(image_member or [], caption_member or []),
                bad_samples=bad_samples,
                with_text=with_text,
                dtype=dtype,
                fields=wanted,
                world=world,
                progress=show,
            )
        if done.bad:
            print(account_of(done.images, done.bad).text())
        if world.rank == 0 and (done.renewed or done.removed):
            print(f"{out}: {done.renewed:,} shards changed and are embedded again, {done.removed:,} are removed")
        total = int(world.sum(torch.tensor([done.images])))
        if world.rank != 0:
            return
        index = Index(out)
        if not len(index):
            raise UserError(
                f"no image could be used, so a search in {out} finds nothing; remove it, and give other DATA"
            )
        print(f"{out}: {len(index):,} images, {total:,} of them embedded now")
        if graph or (graph is None and (done.had_graph or len(index) > LARGE)):
            with status("building the graph"):
                index.build_graph()
            print(f"{out}: graph built")
        for missing in sorted(set(wanted or ()) - set(index.fields)):
            print(f"no image has the field {missing}, or its values are too long to be stored")
        for path, write in ((parquet, write_parquet), (faiss, write_faiss)):
            if path is not None:
                with status(f"writing {path}"):
                    write(index, path)
                print(f"{path}: {len(index):,} rows")


@verb(120)
def search(
    model: ModelName,
    index: Annotated[Path, typer.Argument(help="Folder that mmssl embed wrote.")],
    query: Annotated[str, typer.Argument(help="Text, or an image file.")],
    text: Annotated[
        str | None,
        typer.Option(help="What should differ from QUERY, as 'in red': the sum of both unit embeddings is searched."),
    ] = None,
    text_weight: Annotated[
        float, typer.Option(min=0, max=1, help="Share of --text in that sum: 0 is the query alone, 1 the text alone.")
    ] = 0.5,
    count: Annotated[int, typer.Option("--count", "-k", min=1, help="Images to find.")] = 10,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare with every image, even if the index has a graph.")
    ] = False,
    distinct: Annotated[
        float | None,
        typer.Option(
            metavar="COSINE",
            min=0,
            max=1,
            help="Leave out images whose cosine with a better hit is above this, such as 0.95: copies and series.",
        ),
    ] = None,
    where: Where = None,
    dim: Dim = None,
    out: Annotated[Path | None, typer.Option(help="Draw the images to this PNG; reads the shards.")] = None,
    remote: Annotated[
        bool,
        typer.Option("--remote", help="With --out: also fetch images from the web or object stores that INDEX names."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the hits as JSON instead of a table.")] = False,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Find the images nearest to a text or to an image. An index of the first dimensions (embed --dim) is searched with
    these.

    Example: mmssl search runs/mine index "two dogs on a beach" --where source=holiday --out hits.png
    """
    from mmssl.apps.search import Index, draw_hits, encode_query, read_images
    from mmssl.data.shards import is_remote

    stored, conditions = Index(index, dim), where or ()
    stored.conditions(conditions)  # a wrong one is said before the model is loaded
    loaded = stored.fit(load_model(model, device, precision))
    wanted = encode_query(loaded, query, text, text_weight)
    if distinct is None:
        rows, similarities = stored.nearest(wanted, count, exact or None, conditions)
    else:
        rows, similarities = stored.distinct(wanted, count, distinct, exact or None, conditions)
    hits = stored.hits(rows[0].tolist(), similarities[0].tolist())
    if as_json:
        print(json.dumps([asdict(hit) for hit in hits], indent=1, ensure_ascii=False))
    elif hits:
        stdout().print(_table(hits))
    else:
        print("no image meets the conditions" if conditions else f"{index} holds no images")
    if out is not None:
        images = read_images(hits, stored.members, remote)
        with writing(out, remedy="give another file"):
            draw_hits(out, query if text is None else f"{query} + {text}", hits, images)
        if not as_json:
            print(f"{out}: {sum(image is not None for image in images)} images")
            unread = [hit.shard for hit in hits if is_remote(hit.shard)]
            if unread and not remote:
                print(f"{len(unread)} images are in remote shards, such as {unread[0]}; add --remote to fetch them")


def _table(hits: "list[Hit]") -> "Table":
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(
        Column("similarity", no_wrap=True), *(Column(name, overflow="fold") for name in ("key", "caption", "shard"))
    )
    for hit in hits:
        table.add_row(f"{hit.similarity:.4f}", *map(Text, (hit.key, hit.caption, Path(hit.shard).name)))
    return table
