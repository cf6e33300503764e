"""The probabilities of labels for images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from mmssl.data.shards import IMAGES
from mmssl.data.transforms import DecodeError
from mmssl.errors import UserError
from mmssl.evaluate.prompts import Templates
from mmssl.evaluate.tasks.zero_shot import class_weights
from mmssl.inference.model import ImageInput, Model
from mmssl.inference.plots import draw_prediction, pixels_of

ENDING = "-predicted.png"
_TOGETHER = 256
Classify = Callable[[Sequence[ImageInput]], list[dict[str, float]]]
"""Images -> label -> probability, of each."""


@dataclass(frozen=True)
class Prediction:
    """What one image shows."""

    image: str
    """The file, or `image 1` and so on where there is none."""
    probabilities: dict[str, float]
    """Label -> probability, the highest first."""
    saved: Path | None = None
    """Where it was drawn."""

    @property
    def label(self) -> str:
        """The most probable label."""
        return next(iter(self.probabilities))

    @property
    def probability(self) -> float:
        """Its probability."""
        return self.probabilities[self.label]

    def __str__(self) -> str:
        shown = ", ".join(f"{label} {value:.1%}" for label, value in islice(self.probabilities.items(), 5))
        return f"{self.image}: {shown}" + ("" if self.saved is None else f" (drawn to {self.saved})")


def predict(images: Sequence[ImageInput], classify: Classify, save: bool | Path = False) -> Iterator[Prediction]:
    """Each image's prediction, in order.

    Args:
        save: draw each to a PNG beside it (in the current folder where it is no file), or into a folder.

    Raises:
        UserError: an image cannot be read, or a drawing cannot be written.
    """
    places = iter(_places(images, save))
    for start in range(0, len(images), _TOGETHER):
        part = images[start : start + _TOGETHER]
        probabilities = _classified(classify, part, start)
        for number, (image, found) in enumerate(zip(part, probabilities, strict=True), start=start):
            ranked = dict(sorted(found.items(), key=lambda pair: -pair[1]))
            prediction = Prediction(output_name(image, number), ranked)
            yield prediction if save is False else saved(prediction, image, next(places))


def zero_shot(model: Model, labels: Sequence[str], templates: Templates = ("{c}",)) -> Classify:
    """Classification by the texts of labels.

    Args:
        templates: texts with `{c}` for the label; of several the mean vector is taken.

    Raises:
        UserError: there are no labels, one is empty or there twice, or a template lacks `{c}`.
    """
    weights = class_weights(model, checked(labels), _checked_templates(templates))

    def classify(images: Sequence[ImageInput]) -> list[dict[str, float]]:
        logits = model.logit_scale * model.encode_image(list(images)) @ weights.T
        return [dict(zip(labels, row, strict=True)) for row in logits.softmax(-1).tolist()]

    return classify


def checked(labels: Sequence[str]) -> list[str]:
    """Labels that can be told apart.

    Raises:
        UserError: there is none, or one is empty or there twice.
    """
    names = [labels] if isinstance(labels, str) else list(labels)
    double = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if not names or any(not name.strip() for name in names) or double is not None:
        problem = f"label {double!r} is there twice" if double is not None else "labels are missing or empty"
        raise UserError(f"{problem}; give each once, for example: cat, dog")
    return names


def list_images(images: Iterable[str | Path]) -> list[Path]:
    """Files, and for each folder the images in it, by name; those that `predict` drew there are left out.

    Raises:
        UserError: a file does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, images):
        inside = sorted(p for p in path.glob("*") if _is_image(p))
        if path.is_dir() and not inside:
            raise UserError(f"folder {path} holds no image; the extensions are {', '.join(IMAGES)}")
        if not path.is_dir() and not path.is_file():
            raise UserError(f"no image at {path}; correct the path (the current folder is {Path.cwd()})")
        found += inside if path.is_dir() else [path]
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGES and not path.name.endswith(ENDING) and path.is_file()


def output_name(image: ImageInput, number: int) -> str:
    """The file of an image; for one that is none, its number from 1."""
    return str(image) if isinstance(image, str | Path) else f"image {number + 1}"


def saved(prediction: Prediction, image: ImageInput, path: Path) -> Prediction:
    """Draw a prediction.

    Raises:
        UserError: the drawing cannot be written.
    """
    draw_prediction(path, image, prediction.probabilities)
    return replace(prediction, saved=path)


def _places(images: Sequence[ImageInput], save: bool | Path) -> Iterator[Path]:
    """Where each image is drawn; two files of one name get two places in one folder."""
    taken: set[Path] = set()
    for number, image in enumerate(images):
        name = Path(output_name(image, number))
        folder, stem = name.parent if isinstance(save, bool) else save, name.stem.replace(" ", "-")
        path, copy = folder / f"{stem}{ENDING}", 1
        while path in taken:
            copy += 1
            path = folder / f"{stem}-{copy}{ENDING}"
        taken.add(path)
        yield path


def _classified(classify: Classify, images: Sequence[ImageInput], first: int) -> list[dict[str, float]]:
    """Probabilities; where an image cannot be decoded it is named."""
    try:
        return classify(images)
    except DecodeError:
        for number, image in enumerate(images, start=first):
            try:
                pixels_of(image)
            except DecodeError as error:
                raise UserError(f"{output_name(image, number)} is no image that can be used: {error}") from None
        raise


def _checked_templates(templates: Templates) -> Templates:
    if isinstance(templates, tuple) and not all("{c}" in template for template in templates):
        raise UserError(f"template {next(t for t in templates if '{c}' not in t)!r} has no {{c}} for the label")
    return templates
