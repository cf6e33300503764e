"""The images of a dataset as a model sees them: examples with maps, searches, calibration, and a map of the space."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmssl.apps.explain import DEFAULT, image_maps, overlay
from mmssl.apps.report.encoded_dataset import EncodedSamples, encode_sample, open_evaluated_dataset
from mmssl.apps.report.run_reader import RunRecord
from mmssl.apps.report.thumbnails import plane, sheet, shrunk, uri
from mmssl.errors import UserError
from mmssl.evaluate.metrics import ranking
from mmssl.evaluate.metrics import ranking as metrics
from mmssl.inference import Model
from mmssl.rng import generator

SHOWN = 6
"""Examples of each kind, and searches in each direction."""
FOUND = 5
"""Results shown of a search."""
MAP_POINTS = 600


@dataclass(frozen=True)
class Shown:
    """An image on the page."""

    uri: str
    words: str
    """Alternative text."""
    right: bool | None = None


@dataclass(frozen=True)
class Example:
    """A classified image with its maps."""

    image: Shown
    label: str
    guesses: list[tuple[str, float]]
    """The best classes with their probabilities."""
    right: bool
    maps: list[tuple[str, Shown]]
    """Class name and the map of the places that match it."""


@dataclass(frozen=True)
class Search:
    """A query and its results."""

    query: str | Shown
    found: list[Any]
    """Images (Shown), or pairs of text and whether it is right."""


@dataclass(frozen=True)
class Space:
    """The map: points, with the position of each image in the sheet of thumbnails."""

    method: str
    sheet: str
    points: list[dict[str, Any]]


@dataclass(frozen=True)
class Gallery:
    """The images of one dataset on the page, with a note if something is missing."""

    samples: int = 0
    """Number of encoded images."""
    method: str = ""
    examples: list[Example] = field(default_factory=list)
    by_text: list[Search] = field(default_factory=list)
    by_image: list[Search] = field(default_factory=list)
    bins: list[ranking.CalibrationBin] = field(default_factory=list)
    space: Space | None = None
    note: str | None = None


def gallery(run: RunRecord, key: str, model: Model, limit: int, method: str = DEFAULT) -> Gallery:
    """Build the gallery from up to `limit` images of `DATASET/TASK`; `method` makes the maps of the examples."""
    try:
        dataset = open_evaluated_dataset(run, key)
        if dataset is None:
            return Gallery(note="This evaluation kept no table of its samples, so none can be shown.")
        seen = encode_sample(model, dataset, limit, captioned=key.endswith("/retrieval"))
    except UserError as error:
        return Gallery(note=f"Images cannot be shown: {error}")
    scores = seen.scores
    by_text, by_image = _searches(seen, scores)
    return Gallery(
        samples=len(seen.samples),
        method=method,
        examples=_examples(model, seen, scores, method) if seen.classified else [],
        by_text=by_text,
        by_image=by_image,
        bins=_calibration(model, seen, scores) if seen.classified else [],
        space=_space(seen, scores),
    )


def _examples(model: Model, seen: EncodedSamples, scores: Tensor, method: str) -> list[Example]:
    """Randomly drawn correct examples, then wrong ones."""
    right = scores.argmax(1) == seen.owner
    rng = generator(0, "report examples")
    rows: list[int] = []
    for kind in (right, ~right):
        rows += sorted(rng.permutation(kind.nonzero().flatten().numpy())[:SHOWN].tolist())
    pixels = seen.pixels(model, rows)
    return [_example(model, seen, row, pixels[row], scores[row], method) for row in rows]


def _example(model: Model, seen: EncodedSamples, row: int, pixels: Tensor, scores: Tensor, method: str) -> Example:
    """An image with the maps of the predicted and the correct class. Pixels [3, S, S], similarities [C]."""
    best = (model.logit_scale * scores).softmax(0).topk(min(3, len(seen.texts)))
    owner = int(seen.owner[row])
    classes = list(dict.fromkeys([int(best.indices[0]), owner]))
    weights = seen.weights[classes].to(model.device)
    maps = image_maps(model.encoder, pixels.expand(len(classes), -1, -1, -1).to(model.device), weights, method)
    places = zip(classes, maps.cpu(), strict=True)
    return Example(
        image=Shown(uri(shrunk(pixels)), f"an image of the class {seen.name(owner)}"),
        label=seen.name(owner),
        guesses=[(seen.name(i), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)],
        right=int(scores.argmax()) == owner,
        maps=[
            (seen.name(c), Shown(uri(shrunk(overlay(pixels, h))), f"the places that match {seen.name(c)}"))
            for c, h in places
        ],
    )


def _calibration(model: Model, seen: EncodedSamples, scores: Tensor) -> list[ranking.CalibrationBin]:
    sure = (model.logit_scale * scores).softmax(1).amax(1)
    return metrics.reliability(sure, scores.argmax(1) == seen.owner)


def _searches(seen: EncodedSamples, scores: Tensor) -> tuple[list[Search], list[Search]]:
    """Some texts and the images nearest to them; some images and the texts nearest to them."""
    rng = generator(0, "report searches")
    owned = sorted(set(seen.owner.tolist()))
    queries = sorted(rng.permutation(owned)[:SHOWN].tolist())
    images = sorted(rng.permutation(len(seen.samples))[:SHOWN].tolist())
    by_text = []
    for text in queries:
        best = scores[:, text].topk(min(FOUND, len(scores))).indices.tolist()
        by_text.append(Search(seen.name(text), [_small(seen, row, seen.right(row, text)) for row in best]))
    by_image = []
    for row in images:
        best = scores[row].topk(min(FOUND, scores.shape[1])).indices.tolist()
        by_image.append(Search(_small(seen, row), [(seen.name(i), seen.right(row, i)) for i in best]))
    return by_text, by_image


def _small(seen: EncodedSamples, row: int, right: bool | None = None) -> Shown:
    verdict = "" if right is None else "right: " if right else "wrong: "
    return Shown(uri(seen.small[row]), verdict + seen.name(int(seen.owner[row])), right)


def _space(seen: EncodedSamples, scores: Tensor) -> Space:
    """Evenly spaced images, placed so that images with similar embeddings are close."""
    rows = list(range(0, len(seen.samples), max(1, -(-len(seen.samples) // MAP_POINTS))))
    places, method = plane(seen.features[rows])
    best = scores[rows].argmax(1).tolist()
    points = [
        {
            "x": round(float(x), 4),
            "y": round(float(y), 4),
            "label": seen.name(int(seen.owner[row])),
            "guess": seen.name(guess),
            "right": seen.right(row, guess),
        }
        for row, (x, y), guess in zip(rows, places, best, strict=True)
    ]
    return Space(method, sheet([seen.small[row] for row in rows]), points)
