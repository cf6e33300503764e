"""Images of what a model gets right and wrong, as PNG files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmssl.data.transforms import decoding
from mmssl.evaluate.datasets import Dataset, read_again
from mmssl.evaluate.encode import EncodedImages
from mmssl.evaluate.metrics.classification import Classification
from mmssl.evaluate.metrics.ranking import Confusion, confusion_matrix
from mmssl.evaluate.tasks.retrieval import Retrieval
from mmssl.plotting import GRAY, GREEN, MUTED, RED, TEXT, Page, Pixels, columns, sheet, shrink, wrapped
from mmssl.rng import generator

GREEN_BAR, GRAY_BAR = "#8fdb9f", "#d5dce3"
THUMBNAIL = 160
"""Longest side of a small image, in pixels."""
MATRIX_CLASSES = 30
"""Up to this many classes the whole confusion matrix is drawn."""

Thumbnails = dict[int, Pixels]
"""Row of the data set -> small image, uint8 [H, W, 3]."""


def draw_classification(
    folder: Path,
    name: str,
    dataset: Dataset,
    images: EncodedImages,
    found: Classification,
    scores: Callable[[Tensor], Tensor],
    probable: bool,
) -> None:
    """examples.png and, where something went wrong, confused.png in `folder`.

    Args:
        scores: features [n, D] -> what the bars of the examples show, [n, C].
        probable: whether these are probabilities.
    """
    rows = _examples(found.predictions == found.labels)
    pairs = found.confusions[:12]
    faces = [_faces(found, pair) for pair in pairs]
    wanted = {*rows, *(row for pair in faces for row in pair if row is not None)}
    small = thumbnails(dataset, images, wanted)
    values = scores(images.features[torch.tensor(rows)])
    draw_examples(folder / "examples.png", name, small, found, rows, values, probable)
    if pairs and len(found.classnames) <= MATRIX_CLASSES:
        draw_matrix(folder / "confused.png", name, found)
    elif pairs:
        draw_confused(folder / "confused.png", name, small, found, pairs, faces)


def thumbnails(dataset: Dataset, images: EncodedImages, rows: set[int]) -> Thumbnails:
    """Small images of some rows, from one more pass over the shards."""
    row_of = {images.samples[row].id: row for row in rows}
    found: Thumbnails = {}
    for sample in read_again(dataset):
        if sample.id in row_of:
            found[row_of[sample.id]] = shrink(decoding.decode(sample.image), THUMBNAIL)
            if len(found) == len(rows):
                break
    return found


def draw_examples(
    path: Path,
    name: str,
    small: Thumbnails,
    found: Classification,
    rows: Sequence[int],
    values: Tensor,
    probable: bool,
) -> None:
    """A page of images, each with its five best labels as bars, the right one green.

    Args:
        rows: the samples to show. values: their scores, [len(rows), C].
        probable: whether these are probabilities.
    """
    right = (found.predictions == found.labels).tolist()
    good = sum(right[row] for row in rows)
    title = (
        f"{name}: {100 * found.metrics['acc1']:.1f} % of {len(found.labels):,} images right, "
        f"{len(found.classnames):,} classes\n{good} drawn at random from the right ones, "
        f"{len(rows) - good} from the wrong ones; the true label is green"
    )
    across, width, height = 3, 4.7, 1.75
    with sheet(path, across * width, -(-len(rows) // across) * height + 0.85, title) as page:
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            x, y = 0.15 + place % across * width, 0.75 + place // across * height
            page.image(x, y, 1.5, small[row], GREEN if right[row] else RED)
            _bars(page, x + 1.6, y, value, int(found.labels[row]), found.classnames, probable)


def draw_confused(
    path: Path,
    name: str,
    small: Thumbnails,
    found: Classification,
    pairs: Sequence[Confusion],
    faces: Sequence[tuple[int, int | None]],
) -> None:
    """The most frequent mistakes: a mistaken image, one of the class it was taken for, and how often."""
    across, width, height = 2, 5.7, 1.4
    size = (across * width, -(-len(pairs) // across) * height + 0.6)
    with sheet(path, *size, f"{name}: most confused classes") as page:
        for place, (pair, (mistaken, typical)) in enumerate(zip(pairs, faces, strict=True)):
            x, y = 0.2 + place % across * width, 0.5 + place // across * height
            page.image(x, y, 1.2, small[mistaken], RED)
            page.image(x + 4.1, y, 1.2, None if typical is None else small[typical], GRAY)
            label, taken = (wrapped(found.classnames[c], 28, 2) for c in (pair.label, pair.prediction))
            share = f"{pair.count} of {found.per_class[pair.label].samples} taken for"
            page.text(x + 2.65, y + 0.05, label, ha="center", va="top", weight="bold")
            page.text(x + 2.65, y + 0.6, share, ha="center", color=RED)
            page.text(x + 2.65, y + 1.15, taken, ha="center", va="bottom", weight="bold")


def draw_matrix(path: Path, name: str, found: Classification) -> None:
    """The confusion matrix, each row in percent of its label's samples."""
    classes = len(found.classnames)
    counts = confusion_matrix(found.predictions, found.labels, classes).double()
    percent = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    names = [wrapped(label, 24, 1) for label in found.classnames]
    cell, margin = 0.42, 0.5 + 0.085 * max(map(columns, names))
    side = margin + classes * cell + 0.3
    with sheet(path, side, side + 0.2, f"{name}: what the images of each row were taken for, in %") as page:
        for row in range(classes):
            page.text(margin - 0.08, 0.5 + (row + 0.5) * cell, names[row], ha="right")
            page.text(
                margin + (row + 0.5) * cell,
                0.58 + classes * cell,
                names[row],
                va="top",
                ha="center",
                rotation=90,
            )
        extent = (margin, margin + classes * cell, 0.5 + classes * cell, 0.5)
        page.axes.imshow(percent, extent=extent, aspect="auto", cmap="Blues", vmin=0, vmax=100)
        for row, column in np.argwhere(percent >= 0.5):
            x, y = margin + (column + 0.5) * cell, 0.5 + (row + 0.5) * cell
            shade = "white" if percent[row, column] > 55 else "black"
            page.text(x, y, f"{percent[row, column]:.0f}", ha="center", color=shade, fontsize=8)


def draw_retrieval(folder: Path, name: str, dataset: Dataset, encoded: EncodedImages, found: Retrieval) -> None:
    """retrieval.png in `folder`: the five best images for some captions, and the other way round."""
    rng = generator(0, "retrieval")
    queries: list[int] = sorted(rng.permutation(len(found.captions))[:6].tolist())
    shown: list[int] = sorted(rng.permutation(len(encoded.samples))[:6].tolist())
    scores = found.caption_features[torch.tensor(queries)] @ encoded.features.T
    best_images = scores.topk(min(5, scores.shape[1])).indices.tolist()
    scores = encoded.features[torch.tensor(shown)] @ found.caption_features.T
    best_captions = scores.topk(min(5, scores.shape[1])).indices.tolist()
    small = thumbnails(dataset, encoded, {*shown, *(row for rows in best_images for row in rows)})
    owner = found.image_of_caption.tolist()
    title = f"{name}: search among {len(encoded.samples):,} images and {len(found.captions):,} captions"
    height = 1.35
    with sheet(folder / "retrieval.png", 15.2, max(len(queries), len(shown)) * height + 1.0, title) as page:
        page.text(2.3, 0.65, "caption → best images (its own: green)", color=MUTED)
        page.text(9.5, 0.65, "image → best captions (its own: green)", color=MUTED)
        for place, (query, rows) in enumerate(zip(queries, best_images, strict=True)):
            y = 0.85 + place * height
            page.text(2.15, y + 0.6, wrapped(found.captions[query], 28, 5), ha="right")
            for column, row in enumerate(rows):
                page.image(2.3 + 1.3 * column, y, 1.2, small[row], GREEN if row == owner[query] else GRAY)
        for place, (image, texts) in enumerate(zip(shown, best_captions, strict=True)):
            y = 0.85 + place * height
            page.image(9.5, y, 1.2, small[image], MUTED)
            for line, text in enumerate(texts):
                style = {"color": GREEN, "weight": "bold"} if owner[text] == image else {"color": TEXT}
                page.text(10.85, y + 0.12 + 0.24 * line, wrapped(found.captions[text], 60, 1), **style)


def _examples(right: Tensor) -> list[int]:
    """Six rows drawn from the right ones and six from the wrong ones, or more where the others are scarce."""
    rng = generator(0, "examples")
    good: list[int] = rng.permutation(right.nonzero().flatten().numpy()).tolist()
    bad: list[int] = rng.permutation((~right).nonzero().flatten().numpy()).tolist()
    good = good[: 12 - min(6, len(bad))]
    return good + bad[: 12 - len(good)]


def _faces(found: Classification, pair: Confusion) -> tuple[int, int | None]:
    """A row that shows the mistake, and a row of the class it was taken for, if that has any."""
    mistaken = (found.labels == pair.label) & (found.predictions == pair.prediction)
    typical = (found.labels == pair.prediction).nonzero().flatten().tolist()
    return int(mistaken.nonzero()[0]), typical[0] if typical else None


def _bars(
    page: Page, x: float, y: float, values: Tensor, label: int, classnames: Sequence[str], probable: bool
) -> None:
    """The five best classes as bars from (x, y) down, and the true one below where it is not among them."""
    best = values.topk(min(5, len(values)))
    full = 1.0 if probable else max(1e-6, float(best.values.max()))
    for place, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        top = y + 0.25 * place
        page.bar(x, top + 0.015, 2.7 * max(0.0, value) / full, 0.22, GREEN_BAR if index == label else GRAY_BAR)
        text = f"{wrapped(classnames[index], 32, 1)}  {f'{100 * value:.0f} %' if probable else f'{value:.2f}'}"
        page.text(x + 0.05, top + 0.125, text, weight="bold" if index == label else "normal")
    if label not in best.indices.tolist():
        rank = 1 + int((values > values[label]).sum())
        text = f"{wrapped(classnames[label], 26, 1)}  (place {rank:,})"
        page.text(x + 0.05, y + 1.375, text, color=GREEN, weight="bold")
