"""`mmssl predict`: what images show."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mmssl.cli.evaluate import Device, load_on, move
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.inference import Classify, Prediction

SHOWN = 3
"""Labels that are printed of an image."""


def predict(
    model: Annotated[
        str,
        typer.Argument(
            help="A run or a model folder, open_clip:MODEL/TAG, a folder of open_clip or of a Hugging Face CLIP; or a "
            "fine-tuned classifier's folder, which brings its labels."
        ),
    ],
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Files, or folders of them.")],
    labels: Annotated[str | None, typer.Option(help="Labels with commas between them: 'a cat,a dog'.")] = None,
    classnames: Annotated[
        str | None, typer.Option(metavar="FILE", help="Labels from a file, one a line, or 'imagenet'.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Text with {c} for the label, as 'a photo of a {c}.'; repeat. Default: the label alone."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw each image with its probabilities into this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every label's probability as JSON.")] = False,
    device: Device = None,
) -> None:
    """Tell which of some labels each image shows.

    Example: mmssl predict runs/mine photo.jpg --labels 'a cat,a dog' --out drawn/
    """
    from mmssl.inference import list_images
    from mmssl.inference import predict as run

    classify = _classifier(model, _labels(labels, classnames), template, device)
    found = list(run(list_images(images), classify, False if out is None else out))
    if as_json:
        print(
            json.dumps(
                [{"image": p.image, "probabilities": p.probabilities} for p in found], indent=1, ensure_ascii=False
            )
        )
    else:
        Console().print(_table(found))
    if out is not None and not as_json:
        print(f"{out}: {len(found)} drawn")


def _classifier(model: str, labels: list[str] | None, template: list[str] | None, device: str | None) -> "Classify":
    """A fine-tuned classifier, or a model with the texts of labels."""
    from mmssl.apps.finetune.classifier import is_classifier, load_classifier
    from mmssl.inference import zero_shot

    if is_classifier(model):
        if labels is not None or template is not None:
            raise UserError(f"{model} is a fine-tuned classifier and has its own labels; leave --labels and others out")
        classifier = load_classifier(Path(model))
        move(classifier.model, device)
        return classifier.predict
    if labels is None:
        raise UserError("--labels is missing: what may the images show? For example --labels 'a cat,a dog'")
    return zero_shot(load_on(model, device), labels, tuple(template or ["{c}"]))


def _labels(words: str | None, classnames: str | None) -> list[str] | None:
    from mmssl.evaluate.prompts import read_classnames

    if words is not None and classnames is not None:
        raise UserError("--labels and --classnames are both given; give one")
    if classnames is not None:
        return list(read_classnames(classnames))
    return None if words is None else [word.strip() for word in words.split(",")]


def _table(found: "list[Prediction]") -> Table:
    table = Table(Column("image", overflow="fold"), Column("label", no_wrap=True), "probability", "then")
    for prediction in found:
        others = list(prediction.probabilities.items())[1:SHOWN]
        then = ", ".join(f"{label} {value:.1%}" for label, value in others)
        words = (prediction.image, prediction.label, f"{prediction.probability:.1%}", then)
        table.add_row(*map(Text, words))
    return table
