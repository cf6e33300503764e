"""`mmssl explain`, `mmssl bench explain` and `mmssl report`: looking at what was learnt."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from mmssl.cli.evaluate import Device, load_on, parse_device
from mmssl.errors import UserError


def add_reports(app: typer.Typer, bench_app: typer.Typer) -> None:
    """Give the command line these verbs."""
    app.command()(explain)
    app.command()(report)
    bench_app.command("explain")(bench_explain)


def explain(
    model: Annotated[str, typer.Argument(help="A run or a model folder.")],
    image: Annotated[Path, typer.Argument(help="An image's file.")],
    caption: Annotated[str, typer.Argument(help="The words to look for in it.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    method: Annotated[
        str | None,
        typer.Option(help="gradcam, hirescam, relevance, similarity, occlusion or rise. Default: rise."),
    ] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option("--train", help="Training shards, repeat: shows the pairs nearest to image and caption."),
    ] = None,
    device: Device = None,
) -> None:
    """Show where in an image a caption comes from, which of its words matter, and the nearest training pairs."""
    from mmssl.apps.explain import explain as run
    from mmssl.apps.explain import nearest
    from mmssl.apps.explain.plots import draw_explanation

    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is no PNG file; give a name that ends in .png")
    loaded = load_on(model, device)
    found = run(loaded, image, caption, method)
    neighbours = []
    if shards:
        with Console(stderr=True).status("encoding the training pairs"):
            image_embedding, text_embedding = loaded.encode_image(found.image)[0], loaded.encode_text(caption)[0]
            neighbours = [
                ("nearest training images to the image", nearest(loaded, image_embedding, shards)),
                ("nearest training captions to the caption", nearest(loaded, text_embedding, shards, by="caption")),
            ]
    _written(out, lambda: draw_explanation(out, found, neighbours))
    print(f"similarity {found.similarity:.4f}, map by {found.method}")
    for word, score in found.words:
        print(f"  {score:+.4f}  {word}")
    for title, pairs in neighbours:
        print(title)
        for pair in pairs:
            print(f"  {pair.similarity:.3f}  {pair.shard}:{pair.key}  {pair.caption}")
    print(out)


def bench_explain(
    model: Annotated[str, typer.Argument(help="A run or a model folder.")],
    data: Annotated[str, typer.Argument(help="A data set: a folder in CLIP_benchmark's layout, or shards.")],
    out: Annotated[Path, typer.Option(help="Folder for sanity.json and deletion.png.")],
    images: Annotated[int, typer.Option(min=2, help="Images drawn from the data set.")] = 200,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Methods, repeat. Default: all that suit the tower.")
    ] = None,
    device: Device = None,
) -> None:
    """Test explanation maps: deletion curves against random order, and whether shuffled weights change the maps."""
    from mmssl.apps.explain.plots import draw_sanity
    from mmssl.apps.explain.sampling import drawn_pairs
    from mmssl.evaluate.datasets import open_dataset
    from mmssl.files import write_json
    from scripts.bench.explain import sanity

    loaded = load_on(model, device)
    with Console(stderr=True).status("covering patches"):
        pixels, texts = drawn_pairs(loaded, open_dataset(data), images)
        found = sanity(loaded.encoder, pixels, texts, methods)
    _written(out, lambda: write_json(out / "sanity.json", found.json()))
    draw_sanity(out / "deletion.png", found)
    print(found.text())


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option(help="Folder for index.html, the only file of the report.")] = Path("report"),
    images: Annotated[
        int, typer.Option(min=0, help="Images encoded of each data set, for examples and the map; 0: none.")
    ] = 1000,
    method: Annotated[
        str | None, typer.Option(help="How the maps of the examples are made, see mmssl explain. Default: rise.")
    ] = None,
    device: Device = None,
) -> None:
    """Write one page about runs: curves, figures, examples with their maps, searches, and how to repeat them."""
    from mmssl.apps.report import write_report

    with Console(stderr=True).status("reading") as status:
        page, notes = write_report(
            runs,
            out,
            images=images,
            method=method,
            device=parse_device(device),
            progress=lambda what: status.update(Text(what)),
        )
    for note in notes:
        print(f"note: {note}")
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")


def _written(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another place") from None
