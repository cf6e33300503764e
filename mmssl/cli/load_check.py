"""`mmssl load-check`."""

from typing import Annotated

import typer

from mmssl.cli.common import load_model, verb


@verb(105, "load-check")
def load_check(
    model: Annotated[
        str,
        typer.Argument(
            help="open_clip:MODEL/TAG, open_clip:hf-hub:USER/MODEL, transformers:NAME, or a folder of one of the two."
        ),
    ],
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGES]...", help="Image files, or folders of them.")
    ] = None,
) -> None:
    """Compare a pretrained model, as it is read here, with the library that it comes from.

    Embeddings of captions and of random images of the model's size may differ by 1e-4; if they differ by more, the exit
    code is 1. Of IMAGES the smallest cosine is printed: libraries resize them in slightly different ways.

    Example: mmssl load-check open_clip:ViT-B-32/laion2b_s34b_b79k photos/
    """
    from mmssl.apps.export import compare_with_source
    from mmssl.inference import list_images

    files = list_images(images) if images else []
    found = compare_with_source(model, load_model(model, "cpu", show_notes=True), files)
    words = "as its own library has them" if found.holds else "not those of its own library: do not use it"
    print(f"{model}: embeddings differ by {found.difference:.1e} at most, {words}")
    if found.cosine is not None:
        print(f"{len(files)} images: cosine of {found.cosine:.5f} at least")
    if not found.holds:
        raise typer.Exit(1)
