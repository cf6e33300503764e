"""`mmssl predict`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmssl.cli.common import Device, Precision, load_model, parse_device, progress_bar, set_precision, stdout, verb
from mmssl.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from mmssl.inference import Classify, Prediction

SHOWN = 3
"""Labels printed per image."""


@verb(20)
def predict(
    model: Annotated[
        str,
        typer.Argument(
            help="Run or model folder, open_clip:MODEL/TAG, folder of an open_clip or Hugging Face CLIP model, or "
            "folder of a fine-tuned classifier, which has its own labels."
        ),
    ],
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Image files, or folders of them.")],
    labels: Annotated[str | None, typer.Option(help="Labels, separated by commas: 'a cat,a dog'.")] = None,
    classnames: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with one label per line, or 'imagenet'.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Prompt with {c} for the label, as 'a photo of a {c}.'; repeat. Default: the label alone."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw each image with its probabilities into this folder.")] = None,
    bad_images: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Largest fraction of images that may be unreadable; of fewer than 100, it is that of 100.",
        ),
    ] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the probability of every label as JSON.")] = False,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Classify images with the given labels. A model that mmssl calibrate has seen also says if none of them fits.

    Example: mmssl predict runs/mine photo.jpg --labels 'a cat,a dog' --out drawn/
    """
    from mmssl.inference import list_images
    from mmssl.inference import predict as run

    classify = _classifier(model, _read_labels(labels, classnames), template, device, precision, classnames is not None)
    files = list_images(images)
    with progress_bar("images", len(files), text="classifying") as bar:
        found = []
        for prediction in run(files, classify, False if out is None else out, bad_images):
            found.append(prediction)
            bar.advance()
    if as_json:
        print(json.dumps([_record(prediction) for prediction in found], indent=1, ensure_ascii=False))
        return
    stdout().print(_table(found))
    if out is not None:
        print(f"{out}: {len(found)} drawn")


def _classifier(
    model: str,
    labels: list[str] | None,
    template: list[str] | None,
    device: str | None,
    precision: Precision,
    numbered: bool,
) -> "Classify":
    """A fine-tuned classifier, or a zero-shot classifier of the labels, which may be `numbered` if they repeat."""
    from mmssl.apps.finetune import is_classifier, load_classifier
    from mmssl.inference import zero_shot

    if is_classifier(model):
        if labels is not None or template is not None:
            raise UserError(
                f"{model} is a fine-tuned classifier with its own labels; leave out --labels, --classnames and "
                f"--template"
            )
        classifier = load_classifier(Path(model))
        set_precision(classifier.model.to(parse_device(device)), precision)
        return classifier.predict
    if labels is None:
        raise UserError("--labels is missing; give the labels to choose from, for example --labels 'a cat,a dog'")
    templates = tuple(template or ["{c}"])
    return zero_shot(load_model(model, device, precision), labels, templates, numbered=numbered)


def _read_labels(words: str | None, classnames: str | None) -> list[str] | None:
    from mmssl.evaluate import prompts

    if words is not None and classnames is not None:
        raise UserError("--labels and --classnames are both given; give one")
    if classnames is not None:
        return list(prompts.read_classnames(classnames))
    return None if words is None else [word.strip() for word in words.split(",")]


def _record(prediction: "Prediction") -> dict[str, Any]:
    """A prediction as JSON; of a calibrated model with its verdict."""
    record = {"image": prediction.image, "probabilities": prediction.probabilities}
    if prediction.verdict is None:
        return record
    verdict = asdict(prediction.verdict)
    return record | {"none_of_these": verdict.pop("none"), **verdict}


def _table(found: "list[Prediction]") -> "Table":
    """One row per image; of a calibrated model with the probability that none of the labels fits."""
    from rich.table import Column, Table
    from rich.text import Text

    calibrated = any(prediction.verdict is not None for prediction in found)
    table = Table(
        Column("image", overflow="fold"),
        Column("label", overflow="fold"),
        "probability",
        *(["none of these"] if calibrated else []),
        Column("then", overflow="fold"),
    )
    for prediction in found:
        others = list(prediction.probabilities.items())[1:SHOWN]
        then = ", ".join(f"{label} {value:.1%}" for label, value in others)
        none = [] if prediction.verdict is None else [f"{prediction.verdict.none:.1%}"]
        words = (prediction.image, prediction.label, f"{prediction.probability:.1%}", *none, then)
        table.add_row(*map(Text, words))
    return table
