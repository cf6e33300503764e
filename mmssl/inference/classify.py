"""Classification of images by labels: zero-shot, and the predictions of any classifier as a user sees them."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from torch import Tensor

from mmssl.data.shards import IMAGES
from mmssl.data.transforms import DecodeError
from mmssl.errors import UserError
from mmssl.evaluate import encode, prompts
from mmssl.inference.model import ImageInput, Model, pixels_of
from mmssl.plotting import BLUE, drawing, hide_spines

ENDING = "-predicted.png"
SHOWN = 5
"""Number of labels in a drawing."""
_OTHERS = "#94a3b8"
BATCH = 256
"""Images that are classified together."""
Classify = Callable[[Sequence[ImageInput]], list[dict[str, float]]]
"""Images -> for each image label -> probability."""


@dataclass(frozen=True)
class Prediction:
    """The classification of one image."""

    image: str
    """The file name; `image 1`, `image 2` ... for images that are not files."""
    probabilities: dict[str, float]
    """Label -> probability, highest first."""
    saved: Path | None = None
    """The drawing, if there is one."""

    @property
    def label(self) -> str:
        """The most probable label."""
        return next(iter(self.probabilities))

    @property
    def probability(self) -> float:
        """The probability of that label."""
        return self.probabilities[self.label]

    def __str__(self) -> str:
        shown = ", ".join(f"{label} {value:.1%}" for label, value in islice(self.probabilities.items(), 5))
        return f"{self.image}: {shown}" + ("" if self.saved is None else f" (drawn to {self.saved})")


def predict(images: Sequence[ImageInput], classify: Classify, save: bool | Path = False) -> Iterator[Prediction]:
    """Each image's prediction, in order.

    Args:
        save: a folder for drawings; True draws each image to a PNG beside it (images that are not files to the current
            folder).

    Raises:
        UserError: an image cannot be read, or a drawing cannot be written.
    """
    places = iter(_places(images, save))
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        probabilities = _classified(classify, part, start)
        for number, (image, found) in enumerate(zip(part, probabilities, strict=True), start=start):
            ranked = dict(sorted(found.items(), key=lambda pair: -pair[1]))
            prediction = Prediction(output_name(image, number), ranked)
            yield prediction if save is False else saved(prediction, image, next(places))


def zero_shot(model: Model, labels: Sequence[str], templates: prompts.Templates = ("{c}",)) -> Classify:
    """Zero-shot classification, with labels and templates checked.

    Args:
        templates: texts with `{c}` for the label; with several, their mean vector is used.

    Raises:
        UserError: labels are missing, empty or repeated, or a template lacks `{c}`.
    """
    return ZeroShotClassifier(model, check_labels(labels), _check_templates(templates))


class ZeroShotClassifier:
    """Classifies images by the texts of labels."""

    def __init__(self, model: Model, labels: Sequence[str], templates: prompts.Templates = ("{c}",)) -> None:
        self._model = model
        self.labels = list(labels)
        self.weights = encode.class_weights(model, self.labels, templates)
        """Unit vectors of the labels, [C, D]."""

    def __call__(self, images: Sequence[ImageInput]) -> list[dict[str, float]]:
        similarities = self._model.encode_image(images) @ self.weights.T
        return label_probabilities(self.labels, self._model.logit_scale * similarities)


def label_probabilities(labels: Sequence[str], logits: Tensor) -> list[dict[str, float]]:
    """For each row of logits [N, C], label -> probability, highest first."""
    return [
        {labels[index]: float(row[index]) for index in row.argsort(descending=True, stable=True).tolist()}
        for row in logits.double().softmax(dim=1)
    ]


def check_labels(labels: Sequence[str]) -> list[str]:
    """Labels as a list of different texts.

    Raises:
        UserError: labels are missing, empty or repeated.
    """
    names = [labels] if isinstance(labels, str) else list(labels)
    double = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if not names or any(not name.strip() for name in names) or double is not None:
        problem = f"label {double!r} is repeated" if double is not None else "labels are missing or empty"
        raise UserError(f"{problem}; give each once, for example: cat, dog")
    return names


def list_images(images: Iterable[str | Path]) -> list[Path]:
    """Files, and the images of each folder by name, without the drawings of `predict`.

    Raises:
        UserError: a file does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, images):
        inside = sorted(p for p in path.glob("*") if _is_image(p))
        if path.is_dir() and not inside:
            raise UserError(f"folder {path} holds no image; known extensions are {', '.join(IMAGES)}")
        if not path.is_dir() and not path.is_file():
            raise UserError(f"no image at {path}; correct the path (the current folder is {Path.cwd()})")
        found += inside if path.is_dir() else [path]
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGES and not path.name.endswith(ENDING) and path.is_file()


def output_name(image: ImageInput, number: int) -> str:
    """The file name of an image, or its number from 1 if it is not a file."""
    return str(image) if isinstance(image, str | Path) else f"image {number + 1}"


def saved(prediction: Prediction, image: ImageInput, path: Path) -> Prediction:
    """Draw a prediction.

    Raises:
        UserError: the drawing cannot be written.
    """
    draw_prediction(path, image, prediction.probabilities)
    return replace(prediction, saved=path)


def draw_prediction(path: Path, image: ImageInput, probabilities: Mapping[str, float]) -> None:
    """Write a PNG: the image, and beside it a bar for each of the most probable labels.

    Args:
        probabilities: label -> probability, the highest first.
    """
    shown = list(islice(probabilities.items(), SHOWN))
    names = [textwrap.shorten(label, 32, placeholder=" …") for label, _ in shown]
    heights = [value for _, value in shown]
    with drawing(path, 8, 3.6) as canvas:
        left, bars = canvas.subplots(1, 2, width_ratios=[1, 1.2])
        left.imshow(pixels_of(image))
        left.set_axis_off()
        bars.barh(range(len(shown)), heights, color=[BLUE, *[_OTHERS] * (len(shown) - 1)])
        bars.set_yticks(range(len(shown)), names, fontsize=10, parse_math=False)
        for place, value in enumerate(heights):
            bars.text(min(value, 0.84) + 0.01, place, f"{value:.1%}", va="center", fontsize=9)
        bars.set_xlim(0, 1)
        bars.invert_yaxis()
        bars.xaxis.set_visible(False)
        hide_spines(bars)


def _places(images: Sequence[ImageInput], save: bool | Path) -> Iterator[Path]:
    """The path of each drawing; images of the same name get different paths."""
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
    """Probabilities; an image that cannot be decoded is named."""
    try:
        return classify(images)
    except DecodeError:
        for number, image in enumerate(images, start=first):
            try:
                pixels_of(image)
            except DecodeError as error:
                raise UserError(f"{output_name(image, number)} is not a usable image: {error}") from None
        raise


def _check_templates(templates: prompts.Templates) -> prompts.Templates:
    if isinstance(templates, tuple) and not all("{c}" in template for template in templates):
        raise UserError(f"template {next(t for t in templates if '{c}' not in t)!r} has no {{c}} for the label")
    return templates
