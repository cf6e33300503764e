"""`mmssl export`, `mmssl embed`, `mmssl search` and `mmssl bench search`: using a model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mmssl.cli.evaluate import Device
from mmssl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mmssl.apps.search import Hit
    from mmssl.inference import Model

ModelName = Annotated[
    str,
    typer.Argument(
        help="A run or a model folder, open_clip:MODEL/TAG, a folder of open_clip or of a Hugging Face CLIP."
    ),
]
LARGE = 200_000
"""Above so many images, comparing with each takes longer than a person wants to wait."""


def add_use(app: typer.Typer, bench_app: typer.Typer) -> None:
    """Give the command line these verbs."""
    app.command()(export)
    app.command()(embed)
    app.command()(search)
    bench_app.command("search")(bench_search)


def export(
    model: ModelName,
    kind: Annotated[
        str, typer.Option("--format", help="open_clip, hf, sentence-transformers, onnx or timm: who opens the files.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be empty or not exist.")],
    int8: Annotated[bool, typer.Option("--int8", help="With onnx: 8-bit weights; smaller, less exact.")] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(help="With --int8: a data set of zero-shot classification on which to measure the loss; repeat."),
    ] = None,
    hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="USER/MODEL", help="Upload the folder to the Hugging Face hub."),
    ] = None,
) -> None:
    """Write a model for another library, and check with that library that it gives the same features.

    Example: mmssl export runs/mine --format open_clip --out mine-open-clip
    """
    from mmssl.apps.export import export as write
    from mmssl.apps.export.classifier import GRAPH, LABELS, write_classifier
    from mmssl.apps.export.hub import push
    from mmssl.apps.export.to_onnx import quantize
    from mmssl.apps.finetune.classifier import is_classifier, load_classifier

    if int8 and kind != "onnx":
        raise UserError("--int8 needs --format onnx")
    if data and not int8:
        raise UserError("--data measures what --int8 costs; give both")
    loaded = _load(model, "cpu")
    done = write(loaded, kind, out)
    print(f"{done.folder}: {kind}, features differ by {done.difference:.1e} at most")
    if kind == "onnx" and is_classifier(model):
        difference = write_classifier(load_classifier(model), out)
        print(f"{out}/{GRAPH}: probabilities differ by {difference:.1e} at most; labels in {LABELS}")
    if int8:
        print(f"8-bit weights: {quantize(out):.0%} of the size")
    for spec in data or ():
        _print_loss(loaded, out, spec)
    print(done.lines)
    if hub is not None:
        print(f"pushed to {push(out, hub)}")


def _print_loss(model: "Model", folder: Path, spec: str) -> None:
    """Zero-shot accuracy on a data set, whole and in 8 bits."""
    from mmssl.apps.export.to_onnx import OnnxEncoder
    from mmssl.cli.evaluate import find
    from mmssl.evaluate import suite

    for name, dataset in find([spec]).items():
        plan = {name: (dataset, ["zero_shot"])}
        accuracies = []
        for judged in (model, OnnxEncoder(folder)):
            (figures,) = suite.run(judged, plan, None, logit_scale=model.logit_scale).values()
            accuracies.append(float(str(figures["acc1"])))
        whole, small = accuracies
        print(f"zero-shot accuracy on {name}: {whole:.4f}, in 8 bits {small:.4f} ({small - whole:+.4f})")


def embed(
    model: ModelName,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Shards: paths, folders, URLs or patterns; or a table or a folder of images with captions, which is "
            "packed into OUT/shards.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the index. Called again, it goes on.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 256,
    graph: Annotated[
        bool | None,
        typer.Option(
            "--graph/--no-graph", help="Build a graph for fast search of large sets. Default: from 200,000 images."
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Store the vector of every image: float16 arrays and Parquet tables of keys and captions.

    On many processes: torchrun --nproc_per_node N -m mmssl embed MODEL SHARDS... --out DIR, or
    accelerate launch --num_processes N -m mmssl embed MODEL SHARDS... --out DIR

    Example: mmssl embed runs/mine '/data/pairs/*.tar' --out index
    """
    from mmssl.apps.autoconfig.data import resolve_shards
    from mmssl.apps.search import Index, embed_shards
    from mmssl.distributed import process_group

    with process_group() as world:
        loaded = _load(model, device, quiet=world.rank != 0)
        with Console(stderr=True).status("embedding") as status:
            done = embed_shards(
                loaded,
                resolve_shards(data[0] if len(data) == 1 else data, out / "shards"),
                out,
                batch_size=batch_size,
                world=world,
                progress=lambda count: status.update(f"embedding: {count:,} images"),
            )
        for bad in done.bad[:5]:
            print(f"left out: {bad.shard}:{bad.key}: {bad.error}")
        total = int(world.sum(_count(done.images)))
        if world.rank != 0:
            return
        index = Index(out)
        print(f"{out}: {len(index):,} images, {total:,} of them embedded now")
        if graph or (graph is None and len(index) > LARGE):
            with Console(stderr=True).status("building the graph"):
                index.build_graph()
            print(f"{out}: graph built")


def search(
    model: ModelName,
    index: Annotated[Path, typer.Argument(help="Folder that mmssl embed wrote.")],
    query: Annotated[str, typer.Argument(help="Words, or the file of an image.")],
    count: Annotated[int, typer.Option("--count", "-k", min=1, help="Images to find.")] = 10,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare with every image, also where there is a graph.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Draw the images to this PNG; reads the shards.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the hits as JSON instead of a table.")] = False,
    device: Device = None,
) -> None:
    """Find the images nearest to words or to an image.

    Example: mmssl search runs/mine index "two dogs on a beach" --out hits.png
    """
    from mmssl.apps.search import Index, encode_query
    from mmssl.apps.search.plots import draw_hits, read_images

    stored = Index(index)
    loaded = _load(model, device, quiet=True)
    stored.check(loaded)
    rows, similarities = stored.nearest(encode_query(loaded, query), count, exact or None)
    hits = stored.hits(rows[0].tolist(), similarities[0].tolist())
    if as_json:
        print(json.dumps([asdict(hit) for hit in hits], indent=1, ensure_ascii=False))
    else:
        Console().print(_table(hits))
    if out is not None:
        images = read_images(hits)
        try:
            draw_hits(out, query, hits, images)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror or error}; name another file") from None
        if not as_json:
            print(f"{out}: {len(hits)} images")


def _table(hits: "list[Hit]") -> Table:
    table = Table("similarity", Column("key", overflow="fold"), "caption", "shard")
    for hit in hits:
        table.add_row(f"{hit.similarity:.4f}", *map(Text, (hit.key, hit.caption, Path(hit.shard).name)))
    return table


def bench_search(
    vectors: Annotated[int, typer.Option(min=100, help="Stored vectors, made up.")] = 1_000_000,
    dim: Annotated[int, typer.Option(min=2, help="Their size.")] = 512,
    graph: Annotated[bool, typer.Option(help="Build the graph and measure it too.")] = True,
) -> None:
    """Milliseconds a query among stored vectors, exactly and through the graph, and how many neighbours that finds.

    Building the graph of a million vectors of 512 dimensions takes tens of minutes on one core.
    """
    from scripts.bench.search import bench_search as run

    with Console(stderr=True).status("searching"):
        figures = run(vectors, dim, graph)
    print(figures.text())


def _load(model: str, device: str | None, quiet: bool = False) -> "Model":
    """A model, with a word on what was taken over."""
    from mmssl.cli.evaluate import load_on

    loaded = load_on(model, device)
    if not quiet:
        for note in loaded.notes:
            print(note)
    return loaded


def _count(number: int) -> "Tensor":
    import torch

    return torch.tensor([number])
