"""`mmssl explain`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mmssl.cli.common import Device, load_model, status, verb, writing
from mmssl.errors import UserError


@verb(80)
def explain(
    model: Annotated[str, typer.Argument(help="Run or model folder.")],
    image: Annotated[Path, typer.Argument(help="Image file.")],
    caption: Annotated[str, typer.Argument(help="Caption to locate in the image.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    method: Annotated[
        str | None,
        typer.Option(help="rise, occlusion, gradcam or relevance. Default: rise."),
    ] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option("--train", help="Training shards: also show the pairs nearest to image and caption; repeat."),
    ] = None,
    device: Device = None,
) -> None:
    """Draw which parts of an image match a caption, score its words, and show the nearest training pairs."""
    from mmssl.apps.explain import draw_explanation, nearest
    from mmssl.apps.explain import explain as run

    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is not a PNG file; give a name that ends in .png")
    loaded = load_model(model, device)
    found = run(loaded, image, caption, method)
    neighbours = []
    if shards:
        with status("encoding the training pairs") as spinner:
            image_embedding, text_embedding = loaded.encode_image(found.image)[0], loaded.encode_text(caption)[0]
            near = partial(
                nearest, loaded, shards=shards, progress=lambda what, done: spinner.update(f"{done:,} training {what}")
            )
            neighbours = [
                ("nearest training images to the image", near(image_embedding)),
                ("nearest training captions to the caption", near(text_embedding, by="caption")),
            ]
    with writing(out):
        draw_explanation(out, found, neighbours)
    print(f"similarity {found.similarity:.4f}, map by {found.method}")
    for word, score in found.words:
        print(f"  {score:+.4f}  {word}")
    for title, pairs in neighbours:
        print(title)
        for pair in pairs:
            print(f"  {pair.similarity:.3f}  {pair.shard}:{pair.key}  {pair.caption}")
    print(out)
