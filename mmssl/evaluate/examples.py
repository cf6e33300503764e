"""Example images of an evaluation, as `examples.json` with thumbnails, which the PNG pages and the report draw.

The format is described in docs/evaluation.md.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmssl.data.transforms import decoding
from mmssl.evaluate import plots
from mmssl.evaluate.datasets import read_images
from mmssl.evaluate.example_records import (
    CaptionSearch,
    ClassificationExamples,
    ClassifiedExample,
    ConfusedPair,
    ExampleImage,
    ImageSearch,
    RetrievalExamples,
)
from mmssl.evaluate.metrics.classification import Classification
from mmssl.evaluate.metrics.ranking import Confusion
from mmssl.evaluate.task import TaskContext
from mmssl.files import write_json
from mmssl.plotting import Pixels, shrink
from mmssl.rng import generator
from mmssl.types import Sample

FORMAT = 1
FILE = "examples.json"
THUMBNAIL = 160
"""Longest side of a thumbnail, in pixels."""
EXAMPLES = 12
CONFUSIONS = 12
SEARCHES = 6
"""Searches shown in each direction."""
BEST = 5
"""Classes or search results shown."""
MATRIX_CLASSES = 30
"""Up to this many classes the whole confusion matrix is drawn."""


Thumbnails = dict[int, Pixels]
"""Sample id -> small image."""


def show_classification(
    context: TaskContext, found: Classification, scores: Callable[[Tensor], Tensor], probable: bool
) -> None:
    """Write examples.json, examples.png and, if there are mistakes, confused.png.

    Args:
        scores: features [n, D] -> scores of the classes, [n, C].
        probable: the scores are probabilities.
    """
    assert context.folder is not None
    rows = _draw_rows(found.predictions == found.labels)
    values = scores(context.images.features[torch.tensor(rows)])
    samples = context.images.samples
    shown = ClassificationExamples(
        data=context.name,
        samples=len(found.labels),
        classes=len(found.classnames),
        acc1=found.metrics["acc1"],
        probabilities=probable,
        examples=[_classified(samples[row], row, found, value) for row, value in zip(rows, values, strict=True)],
        confused=[_confused(samples, found, pair) for pair in found.confusions[:CONFUSIONS]],
    )
    images = [example.image for example in shown.examples]
    images += [image for pair in shown.confused for image in (pair.mistaken, pair.typical) if image is not None]
    small = _write(context, "classification", shown, images)
    plots.draw_examples(context.folder / "examples.png", shown, small)
    if shown.confused and len(found.classnames) <= MATRIX_CLASSES:
        plots.draw_matrix(context.folder / "confused.png", context.name, found)
    elif shown.confused:
        plots.draw_confused(context.folder / "confused.png", shown, small)


def show_retrieval(
    context: TaskContext, captions: Sequence[str], features: Tensor, owners: tuple[Tensor, Tensor]
) -> None:
    """Write examples.json and retrieval.png: the best images for some captions, and the best captions for some images.

    Args:
        features: of the captions, [M, D].
        owners: the sample of each caption, int64 [M], and of each image, int64 [N].
    """
    assert context.folder is not None
    rng = generator(0, "retrieval")
    samples, images = context.images.samples, context.images.features
    queries: list[int] = sorted(rng.permutation(len(captions))[:SEARCHES].tolist())
    rows: list[int] = sorted(rng.permutation(len(samples))[:SEARCHES].tolist())
    of_caption, of_image = (owner.tolist() for owner in owners)
    by_caption = [
        CaptionSearch(captions[query], [(_image(samples[row]), of_image[row] == of_caption[query]) for row in best])
        for query, best in zip(queries, _best(features[torch.tensor(queries)] @ images.T), strict=True)
    ]
    by_image = [
        ImageSearch(_image(samples[row]), [(captions[text], of_caption[text] == of_image[row]) for text in best])
        for row, best in zip(rows, _best(images[torch.tensor(rows)] @ features.T), strict=True)
    ]
    shown = RetrievalExamples(context.name, len(samples), len(captions), by_caption, by_image)
    images_shown = [search.image for search in by_image] + [image for s in by_caption for image, _ in s.found]
    small = _write(context, "retrieval", shown, images_shown)
    plots.draw_retrieval(context.folder / "retrieval.png", shown, small)


def _write(
    context: TaskContext, kind: str, shown: ClassificationExamples | RetrievalExamples, images: Iterable[ExampleImage]
) -> Thumbnails:
    """Write examples.json and the thumbnails; returns the thumbnails."""
    assert context.folder is not None
    wanted = {image.id: image for image in images}
    known = [sample for sample in context.images.samples if sample.id in wanted]
    small = {sample.id: shrink(decoding.decode(sample.image), THUMBNAIL) for sample in read_images(known)}
    for number, pixels in small.items():
        path = context.folder / wanted[number].thumbnail
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, "WEBP", quality=82, method=5)
    tree: dict[str, Any] = {"format": FORMAT, "kind": kind, **asdict(shown)}
    write_json(context.folder / FILE, tree)
    return small


def _image(sample: Sample) -> ExampleImage:
    return ExampleImage(sample.id, sample.shard, sample.key, f"thumbnails/{sample.id}.webp")


def _classified(sample: Sample, row: int, found: Classification, values: Tensor) -> ClassifiedExample:
    """An example with its scores of the classes, [C]."""
    label, names = int(found.labels[row]), found.classnames
    best = values.topk(min(BEST, len(values)))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return ClassifiedExample(
        image=_image(sample),
        label=names[label],
        right=int(found.predictions[row]) == label,
        rank=1 + int((values > values[label]).sum()),
        best=[(names[index], value) for value, index in pairs],
    )


def _confused(samples: Sequence[Sample], found: Classification, pair: Confusion) -> ConfusedPair:
    mistaken = (found.labels == pair.label) & (found.predictions == pair.prediction)
    typical = (found.labels == pair.prediction).nonzero().flatten().tolist()
    return ConfusedPair(
        label=found.classnames[pair.label],
        prediction=found.classnames[pair.prediction],
        count=pair.count,
        samples=found.per_class[pair.label].samples,
        mistaken=_image(samples[int(mistaken.nonzero()[0])]),
        typical=_image(samples[typical[0]]) if typical else None,
    )


def _draw_rows(right: Tensor) -> list[int]:
    """Six random correct rows and six wrong ones; more of one kind if the other has fewer."""
    rng = generator(0, "examples")
    good: list[int] = rng.permutation(right.nonzero().flatten().numpy()).tolist()
    bad: list[int] = rng.permutation((~right).nonzero().flatten().numpy()).tolist()
    good = good[: EXAMPLES - min(EXAMPLES // 2, len(bad))]
    return good + bad[: EXAMPLES - len(good)]


def _best(scores: Tensor) -> list[list[int]]:
    found: list[list[int]] = scores.topk(min(BEST, scores.shape[1])).indices.tolist()
    return found
