"""Trials: images among candidates of which one is right, from a dataset with labels or with captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate import datasets, encode, labels, suite
from mmssl.evaluate.metrics import calibration
from mmssl.inference import Model
from mmssl.rng import generator
from mmssl.types import Sample

By = Literal["labels", "captions"]
CANDIDATES = 100
"""Captions that an image is compared with: its own, and others drawn at random."""
_ROWS_PER_BLOCK = 256


@dataclass(frozen=True)
class Trials:
    """N images, each with its similarities to C candidates."""

    name: str
    """Name of the data."""
    similarities: Tensor
    """[N, C]."""
    right: Tensor
    """The right candidate of each image, int64 [N]."""

    def rows(self, chosen: Tensor) -> "Trials":
        """Some of them."""
        return Trials(self.name, self.similarities[chosen], self.right[chosen])

    def own(self) -> Tensor:
        """Similarity to the right candidate, [N]."""
        return self.similarities.gather(1, self.right[:, None])[:, 0]

    def others(self) -> Tensor:
        """Similarities to the wrong candidates, [N, C - 1]."""
        wrong = torch.ones_like(self.similarities, dtype=torch.bool).scatter_(1, self.right[:, None], False)
        return self.similarities[wrong].view(len(self.right), -1)

    def familiarities(self, scale: float, curve: float) -> tuple[Tensor, Tensor]:
        """The familiarity of images with the right candidate among the others, and without it, float64 [N] each."""
        bent = (calibration.bend(part.double(), curve) for part in (self.similarities, self.others()))
        known, unknown = (calibration.familiarity(part, scale) for part in bent)
        return known, unknown


class Head(Protocol):
    """The head of a classifier on the model's image vectors."""

    labels: list[str]

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, C] of image vectors [N, D]."""


def trials_of(
    model: Model,
    dataset: datasets.Dataset,
    by: By | None = None,
    options: suite.SuiteOptions | None = None,
    head: Head | None = None,
) -> Trials:
    """The images of a dataset, among its labels or among captions.

    Args:
        by: default: labels if the dataset has class names or names the field of its labels, else captions.
        head: of a classifier, whose labels are the candidates, and whose logits stand for similarities.

    Raises:
        UserError: the dataset has no such labels or captions, or fewer than three different ones.
    """
    settings = options or suite.SuiteOptions()
    if head is not None and by == "captions":
        raise UserError("a classifier knows labels, no captions; leave out --by captions")
    if head is not None:
        by = "labels"
    chosen = by or ("labels" if dataset.classnames is not None or dataset.label is not None else "captions")
    if chosen == "labels" and dataset.kind == "multilabel":
        raise UserError(f"dataset {dataset.name!r} has several labels per image; calibrate on captions: --by captions")
    check: Callable[[Sample], Any] = (
        partial(labels.sample_label, dataset) if chosen == "labels" else labels.image_captions
    )
    encoder = suite.DatasetEncoder(model, settings)
    images = suite.usable_images(encoder.encode(dataset, dataset.name, [check]), check)
    suite.report_bad(dataset.name, images, settings)
    context = encoder.context(dataset.name, dataset, images, None)
    if chosen == "labels":
        names, right = labels.class_indices(dataset, images.samples)
        if head is not None:
            _require(len(head.labels), "the classifier", "labels")
            return Trials(dataset.name, head.logits(images.features), _among_labels(head.labels, names, right))
        _require(len(names), dataset.name, "classes")
        return Trials(dataset.name, images.features @ context.class_weights(names).T, right)
    firsts, texts, words = _captions(images)
    features = context.encode_texts(texts)
    return Trials(dataset.name, *_among_captions(images.features[firsts], features, words))


def _among_labels(known: list[str], names: Sequence[str], right: Tensor) -> Tensor:
    """The classifier's numbers of the classes of images, int64 [N].

    Args:
        names: of the dataset's classes. right: the class of each image, int64 [N].

    Raises:
        UserError: an image has a class that the classifier does not know.
    """
    places = {label: place for place, label in enumerate(known)}
    unknown = [names[number] for number in sorted(set(right.tolist())) if names[number] not in places]
    if unknown:
        raise UserError(
            f"the data have images of {unknown[0]!r}, which is none of the classifier's labels ({', '.join(known[:5])}"
            f"{', ...' if len(known) > 5 else ''}); name the field of the labels: --label FIELD, or leave them out"
        )
    return torch.tensor([places.get(name, 0) for name in names])[right]


def _captions(images: encode.EncodedImages) -> tuple[list[int], list[str], Tensor]:
    """The row of each sample's first image, the different captions, and which of them is the first of each sample."""
    numbers = datasets.sample_numbers(images.samples)
    firsts = [row for row, number in enumerate(numbers) if row == 0 or number != numbers[row - 1]]
    own = [labels.image_captions(images.samples[row])[0] for row in firsts]
    places: dict[str, int] = {}
    words = [places.setdefault(" ".join(text.casefold().split()), len(places)) for text in own]
    texts = {place: text for text, place in reversed(list(zip(own, words, strict=True)))}
    return firsts, [texts[place] for place in range(len(texts))], torch.tensor(words)


def _among_captions(images: Tensor, captions: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities of each image to its caption, which comes first, and to others drawn at random.

    Args:
        images: [N, D]. captions: different ones, [M, D]. own: the caption of each image, int64 [N].
    """
    count = len(captions)
    _require(count, "the data", "captions")
    rng, others = generator(0, "candidates"), min(CANDIDATES, count) - 1
    rows = []
    for start in range(0, len(images), _ROWS_PER_BLOCK):
        block, places = images[start : start + _ROWS_PER_BLOCK], own[start : start + _ROWS_PER_BLOCK]
        drawn = torch.tensor([rng.choice(count - 1, others, replace=False).tolist() for _ in places])
        drawn += drawn >= places[:, None]  # the own caption is left out
        rows.append((block @ captions.T).gather(1, torch.cat([places[:, None], drawn], dim=1)))
    return torch.cat(rows), torch.zeros(len(images), dtype=torch.int64)


def _require(count: int, name: str, noun: str) -> None:
    if count < 3:
        raise UserError(f"{name} has {count} different {noun}; calibration compares at least 3")
