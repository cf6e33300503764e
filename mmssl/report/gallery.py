"""What a model makes of a data set's pictures: examples with maps, searches, calibration and the map of the space."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.data.decode import DecodeError, Pixels
from mmssl.data.sample import BadSample
from mmssl.evaluate import metrics
from mmssl.evaluate.datasets import Dataset, captions_of, labels_of, open_dataset, read
from mmssl.evaluate.embed import embed_pictures, embed_texts
from mmssl.evaluate.zero_shot import DEFAULT_TEMPLATES, class_weights
from mmssl.explain import DEFAULT, image_maps
from mmssl.explain.explanation import overlay
from mmssl.explain.maps import heat
from mmssl.model import Model
from mmssl.report.collect import Run, read_table
from mmssl.report.pictures import sheet, shrunk, thumbnail, uri
from mmssl.report.space import plane
from mmssl.rng import generator
from mmssl.types import Sample, UserError

SHOWN = 6
"""Examples of each kind, and searches in each direction."""
FOUND = 5
"""Results shown of a search."""
MAP_POINTS = 600
BINS = 15


@dataclass(frozen=True)
class Shown:
    """A picture on the page."""

    uri: str
    words: str
    """What stands in for it where it cannot be seen."""
    right: bool | None = None


@dataclass(frozen=True)
class Example:
    """A classified picture with its maps."""

    picture: Shown
    label: str
    guesses: list[tuple[str, float]]
    """The best classes with their probabilities."""
    right: bool
    maps: list[tuple[str, Shown]]
    """Class name and where the picture speaks for it."""


@dataclass(frozen=True)
class Search:
    """A query and what it finds."""

    query: str | Shown
    found: list[Any]
    """Pictures (Shown), or pairs of text and whether it is right."""


@dataclass(frozen=True)
class Bin:
    """Samples of similar confidence."""

    low: float
    high: float
    samples: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Space:
    """The map: points with the place of their picture in the sheet."""

    method: str
    sheet: str
    points: list[dict[str, Any]]


@dataclass(frozen=True)
class Gallery:
    """All that is shown of one data set's pictures, with a note where something is missing."""

    samples: int = 0
    """Pictures that were encoded for it."""
    method: str = ""
    examples: list[Example] = field(default_factory=list)
    by_text: list[Search] = field(default_factory=list)
    by_picture: list[Search] = field(default_factory=list)
    bins: list[Bin] = field(default_factory=list)
    space: Space | None = None
    note: str | None = None


@dataclass
class _Seen:
    """A data set as a model sees it. N pictures, M texts."""

    dataset: Dataset
    samples: list[Sample]
    features: Tensor
    small: list[Pixels]
    texts: list[str]
    weights: Tensor
    """Vectors of the texts, [M, D]."""
    owner: Tensor
    """The text that is right for each picture (its first one), int64 [N]."""
    classified: bool
    """Whether the texts are classes."""


def gallery(run: Run, key: str, model: Model, limit: int, method: str = DEFAULT) -> Gallery:
    """Look at up to `limit` pictures of the data set of `DATA SET/TASK`; `method` makes the maps of the examples."""
    try:
        dataset = _dataset(run, key)
        if dataset is None:
            return Gallery(note="This evaluation kept no table of its samples, so none can be shown.")
        seen = _see(model, dataset, limit, captioned=key.endswith("/retrieval"))
    except UserError as error:
        return Gallery(note=f"Pictures cannot be shown: {error}")
    scores = seen.features @ seen.weights.T
    by_text, by_picture = _searches(seen, scores)
    return Gallery(
        samples=len(seen.samples),
        method=method,
        examples=_examples(model, seen, scores, method) if seen.classified else [],
        by_text=by_text,
        by_picture=by_picture,
        bins=_bins(model, seen) if seen.classified else [],
        space=_space(seen, scores),
    )


def _dataset(run: Run, key: str) -> Dataset | None:
    """The data set, found by the shards that the evaluation's tables name."""
    name = key.rsplit("/", 1)[0]
    for table in ("predictions.csv", "ranks.csv"):
        shards = list(dict.fromkeys(row["shard"] for row in read_table(run.tables[key] / table)))
        if shards:
            configured = run.config.evaluate.suites.get(name) if run.config is not None else None
            if configured is not None and Path(configured.data).is_dir():
                return open_dataset(configured.data, name=name)
            return open_dataset(shards, name=name)
    return None


def _see(model: Model, dataset: Dataset, limit: int, captioned: bool) -> _Seen:
    """Encode pictures evenly drawn from a data set, and their captions or the names of the classes."""
    count = sum(1 for _ in read(dataset, _left_out))
    step = max(1, -(-count // limit))
    small: dict[int, Pixels] = {}

    def drawn() -> Iterator[Sample]:
        for place, sample in enumerate(read(dataset, _left_out)):
            if place % step:
                continue
            try:
                small[sample.id] = thumbnail(sample.image)
            except DecodeError:
                continue
            yield sample

    embedded = embed_pictures(model, drawn())
    samples = embedded.samples
    texts, weights, owner, classified = _texts(model, dataset, samples, captioned)
    return _Seen(dataset, samples, embedded.features, [small[s.id] for s in samples], texts, weights, owner, classified)


def _texts(
    model: Model, dataset: Dataset, samples: Sequence[Sample], captioned: bool
) -> tuple[list[str], Tensor, Tensor, bool]:
    if captioned:
        captions = [captions_of(sample)[0] for sample in samples]
        return captions, embed_texts(model, captions), torch.arange(len(samples)), False
    names, labels = labels_of(dataset, samples)
    templates = dataset.templates if dataset.templates is not None else DEFAULT_TEMPLATES
    return list(names), class_weights(model, names, templates), labels, True


def _examples(model: Model, seen: _Seen, scores: Tensor, method: str) -> list[Example]:
    """Right ones, then wrong ones, drawn by chance."""
    right = scores.argmax(1) == seen.owner
    probabilities = (model.logit_scale * scores).softmax(1)
    rng = generator(0, "report examples")
    rows: list[int] = []
    for kind in (right, ~right):
        rows += sorted(rng.permutation(kind.nonzero().flatten().numpy())[:SHOWN].tolist())
    pixels = _as_seen(model, seen, rows)
    examples = []
    for row in rows:
        best = probabilities[row].topk(min(3, len(seen.texts)))
        classes = list(dict.fromkeys([int(best.indices[0]), int(seen.owner[row])]))
        weights = seen.weights[classes].to(model.device)
        maps = image_maps(model.encoder, pixels[row].expand(len(classes), -1, -1, -1).to(model.device), weights, method)
        heats = heat(maps.cpu(), pixels[row].shape[-1])
        label = seen.texts[int(seen.owner[row])]
        examples.append(
            Example(
                picture=Shown(uri(shrunk(pixels[row])), f"a picture of the class {label}"),
                label=label,
                guesses=[(seen.texts[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)],
                right=bool(right[row]),
                maps=[
                    (
                        seen.texts[c],
                        Shown(uri(shrunk(overlay(pixels[row], h))), f"the places that speak for {seen.texts[c]}"),
                    )
                    for c, h in zip(classes, heats, strict=True)
                ],
            )
        )
    return examples


def _as_seen(model: Model, seen: _Seen, rows: Sequence[int]) -> dict[int, Tensor]:
    """The pictures of some rows as the model sees them."""
    wanted = {seen.samples[row].id: row for row in rows}
    found = {}
    for sample in read(seen.dataset, _left_out):
        if sample.id in wanted:
            found[wanted[sample.id]] = model.view(sample.image)
    return found


def _searches(seen: _Seen, scores: Tensor) -> tuple[list[Search], list[Search]]:
    """Some texts and the pictures nearest to them; some pictures and the texts nearest to them."""
    rng = generator(0, "report searches")
    owned = sorted(set(seen.owner.tolist()))
    queries = sorted(rng.permutation(owned)[:SHOWN].tolist())
    pictures = sorted(rng.permutation(len(seen.samples))[:SHOWN].tolist())
    by_text = []
    for text in queries:
        best = scores[:, text].topk(min(FOUND, len(scores))).indices.tolist()
        by_text.append(Search(seen.texts[text], [_small(seen, row, int(seen.owner[row]) == text) for row in best]))
    by_picture = []
    for row in pictures:
        best = scores[row].topk(min(FOUND, scores.shape[1])).indices.tolist()
        right = seen.texts[int(seen.owner[row])]
        by_picture.append(Search(_small(seen, row), [(seen.texts[i], seen.texts[i] == right) for i in best]))
    return by_text, by_picture


def _small(seen: _Seen, row: int, right: bool | None = None) -> Shown:
    verdict = "" if right is None else "right: " if right else "wrong: "
    return Shown(uri(seen.small[row]), verdict + seen.texts[int(seen.owner[row])], right)


def _bins(model: Model, seen: _Seen) -> list[Bin]:
    """Confidence against accuracy, in bins of equal width that have samples."""
    sure = metrics.confidence(seen.features, seen.weights, model.logit_scale)
    right = metrics.top_k(seen.features, seen.weights, 1).first == seen.owner
    index, _ = metrics.calibration_bins(sure, right, BINS)
    return [
        Bin(
            low=bin / BINS,
            high=(bin + 1) / BINS,
            samples=int(inside.sum()),
            confidence=float(sure[inside].mean()),
            accuracy=float(right[inside].double().mean()),
        )
        for bin in range(BINS)
        if (inside := index == bin).any()
    ]


def _space(seen: _Seen, scores: Tensor) -> Space:
    """Pictures drawn evenly, placed so that those alike to the model are near each other."""
    rows = list(range(0, len(seen.samples), max(1, -(-len(seen.samples) // MAP_POINTS))))
    places, method = plane(seen.features[rows])
    best = scores[rows].argmax(1).tolist()
    points = [
        {
            "x": round(float(x), 4),
            "y": round(float(y), 4),
            "label": seen.texts[int(seen.owner[row])],
            "guess": seen.texts[guess],
            "right": seen.texts[guess] == seen.texts[int(seen.owner[row])],
        }
        for row, (x, y), guess in zip(rows, places, best, strict=True)
    ]
    return Space(method, sheet([seen.small[row] for row in rows]), points)


def _left_out(bad: BadSample) -> None:
    """The evaluation counted and named what cannot be read."""
