"""Predictions of any classifier as a user sees them: printed, drawn, without the images that cannot be read."""

import logging
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from mmssl.data import account_of
from mmssl.data.shards import IMAGES, BadSample
from mmssl.data.transforms import DecodeError
from mmssl.errors import UserError
from mmssl.inference.images import ImageInput, pixels_of
from mmssl.inference.probabilities import LabelProbabilities, Verdict
from mmssl.inference.zero_shot import Classify
from mmssl.plotting import BLUE, drawing, hide_spines

_log = logging.getLogger(__name__)
ENDING = "-predicted.png"
SHOWN = 5
"""Number of labels in a drawing."""
_OTHERS = "#94a3b8"
BATCH = 256
"""Images that are classified together."""


@dataclass(frozen=True)
class Prediction:
    """The classification of one image."""

    image: str
    """The file name; `image 1`, `image 2` ... for images that are not files."""
    probabilities: dict[str, float]
    """Label -> probability, highest first."""
    saved: Path | None = None
    """The drawing, if there is one."""
    verdict: Verdict | None = None
    """Whether a label fits at all, of a calibrated model."""

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
        none = "" if self.verdict is None else f"; none of these {self.verdict.none:.1%}"
        return f"{self.image}: {shown}{none}" + ("" if self.saved is None else f" (drawn to {self.saved})")


def predict(
    images: Sequence[ImageInput], classify: Classify, save: bool | Path = False, bad_images: float = 0.1
) -> Iterator[Prediction]:
    """Each image's prediction, in order. Images that cannot be read are left out, and named in a warning at the end.

    Args:
        save: a folder for drawings; True draws each image to a PNG beside it (images that are not files to the current
            folder).
        bad_images: largest fraction of images that may be left out; of fewer than 100, it is that of 100.

    Raises:
        UserError: no image can be read, too many cannot, or a drawing cannot be written.
    """
    places, used, bad = list(_places(images, save)), 0, list[BadSample]()
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        probabilities = _classified(classify, part, start, bad)
        for number, (image, found) in enumerate(zip(part, probabilities, strict=True), start=start):
            if found is None:
                continue
            used += 1
            ranked = dict(sorted(found.items(), key=lambda pair: -pair[1]))
            prediction = Prediction(output_name(image, number), ranked, verdict=found.verdict)
            yield prediction if save is False else saved(prediction, image, places[number])
        if bad and used == 0:
            raise UserError(f"{bad[0].key} is not a usable image: {bad[0].error}")
        account_of(used, bad).limit(bad_images, "raise that limit, --bad-images, or leave them out")
    if bad:
        _log.warning(
            "%d of %d images are left out: %s", len(bad), len(images), "; ".join(account_of(used, bad).causes())
        )


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
    draw_prediction(path, image, prediction)
    return replace(prediction, saved=path)


def draw_prediction(path: Path, image: ImageInput, prediction: Prediction) -> None:
    """Write a PNG: the image, and beside it a bar for each of the most probable labels."""
    shown = list(islice(prediction.probabilities.items(), SHOWN))
    names = [textwrap.shorten(label, 32, placeholder=" …") for label, _ in shown]
    heights = [value for _, value in shown]
    with drawing(path, 8, 3.6) as canvas:
        left, bars = canvas.subplots(1, 2, width_ratios=[1, 1.2])
        left.imshow(pixels_of(image))
        left.set_axis_off()
        bars.barh(range(len(shown)), heights, color=[BLUE, *[_OTHERS] * (len(shown) - 1)])
        bars.set_yticks(range(len(shown)), names, fontsize=10, parse_math=False)
        for place, value in enumerate(heights):
            inside = value > 0.84  # beside the bar there is no room
            end, color = (value - 0.01, "white") if inside else (value + 0.01, "black")
            bars.text(
                end, place, f"{value:.1%}", va="center", ha="right" if inside else "left", color=color, fontsize=9
            )
        bars.set_xlim(0, 1)
        if prediction.verdict is not None:
            bars.set_title(f"none of these: {prediction.verdict.none:.1%}", fontsize=10, loc="left")
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


def _classified(
    classify: Classify, images: Sequence[ImageInput], first: int, bad: list[BadSample]
) -> list[LabelProbabilities | None]:
    """Probabilities; None for images that cannot be read, which join the bad ones.

    Args:
        first: number of the first image.
    """
    try:
        return list(classify(images))
    except (DecodeError, OSError, UserError):
        problems = [_problem(image) for image in images]
        if not any(problems):
            raise
    usable = [image for image, problem in zip(images, problems, strict=True) if problem is None]
    found = iter(classify(usable) if usable else [])
    for number, (image, problem) in enumerate(zip(images, problems, strict=True), start=first):
        if problem is not None:
            bad.append(BadSample("", output_name(image, number), problem))
    return [next(found) if problem is None else None for problem in problems]


def _problem(image: ImageInput) -> str | None:
    """The reason why an image cannot be used; None if it can."""
    try:
        pixels_of(image)
    except DecodeError as error:
        return str(error)
    except OSError as error:
        return f"the file cannot be read: {error.strerror or error}"
    return None
