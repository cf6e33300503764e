"""Pages of correct and wrong predictions, as PNG files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mmssl.evaluate.example_records import ClassificationExamples, ClassifiedExample, RetrievalExamples
from mmssl.evaluate.metrics.classification import Classification
from mmssl.evaluate.metrics.ranking import confusion_matrix
from mmssl.plotting import GRAY, GREEN, MUTED, RED, TEXT, Page, Pixels, columns, sheet, wrapped

GREEN_BAR, GRAY_BAR = "#8fdb9f", "#d5dce3"


def draw_examples(path: Path, shown: ClassificationExamples, small: Mapping[int, Pixels]) -> None:
    """Draw a page of images, each with its best labels as bars, the correct one green.

    Args:
        small: sample id -> thumbnail.
    """
    examples = shown.examples
    good = sum(example.right for example in examples)
    title = (
        f"{shown.data}: {100 * shown.acc1:.1f} % of {shown.samples:,} images right, "
        f"{shown.classes:,} classes\n{good} drawn at random from the right ones, "
        f"{len(examples) - good} from the wrong ones; the true label is green"
    )
    across, width, height = 3, 4.7, 1.75
    with sheet(path, across * width, -(-len(examples) // across) * height + 0.85, title) as page:
        for place, example in enumerate(examples):
            x, y = 0.15 + place % across * width, 0.75 + place // across * height
            page.image(x, y, 1.5, small.get(example.image.id), GREEN if example.right else RED)
            _bars(page, x + 1.6, y, example, shown.probabilities)


def draw_confused(path: Path, shown: ClassificationExamples, small: Mapping[int, Pixels]) -> None:
    """Draw the most frequent mistakes: a misclassified image, one of the predicted class, and the count."""
    across, width, height = 2, 5.7, 1.4
    size = (across * width, -(-len(shown.confused) // across) * height + 0.6)
    with sheet(path, *size, f"{shown.data}: most confused classes") as page:
        for place, pair in enumerate(shown.confused):
            x, y = 0.2 + place % across * width, 0.5 + place // across * height
            page.image(x, y, 1.2, small.get(pair.mistaken.id), RED)
            page.image(x + 4.1, y, 1.2, None if pair.typical is None else small.get(pair.typical.id), GRAY)
            label, prediction = wrapped(pair.label, 28, 2), wrapped(pair.prediction, 28, 2)
            page.text(x + 2.65, y + 0.05, label, ha="center", va="top", weight="bold")
            page.text(x + 2.65, y + 0.6, f"{pair.count} of {pair.samples} taken for", ha="center", color=RED)
            page.text(x + 2.65, y + 1.15, prediction, ha="center", va="bottom", weight="bold")


def draw_matrix(path: Path, name: str, found: Classification) -> None:
    """Draw the confusion matrix, each row in percent of the samples of its label."""
    classes = len(found.classnames)
    counts = confusion_matrix(found.predictions, found.labels, classes).double()
    percent = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    names = [wrapped(label, 24, 1) for label in found.classnames]
    cell, margin = 0.42, 0.5 + 0.085 * max(map(columns, names))
    side = margin + classes * cell + 0.3
    below = 0.5 + classes * cell
    # The title is wider than the matrix of a few classes.
    with sheet(path, max(side, 5.0), side + 0.2, f"{name}: predictions for the images of each row, in %") as page:
        for row in range(classes):
            page.text(margin - 0.08, 0.5 + (row + 0.5) * cell, names[row], ha="right")
            page.text(margin + (row + 0.5) * cell, below + 0.08, names[row], va="top", ha="center", rotation=90)
        extent = (margin, margin + classes * cell, below, 0.5)
        page.axes.imshow(percent, extent=extent, aspect="auto", cmap="Blues", vmin=0, vmax=100)
        for row, column in np.argwhere(percent >= 0.5):
            x, y = margin + (column + 0.5) * cell, 0.5 + (row + 0.5) * cell
            shade = "white" if percent[row, column] > 55 else "black"
            page.text(x, y, f"{percent[row, column]:.0f}", ha="center", color=shade, fontsize=8)


def draw_retrieval(path: Path, shown: RetrievalExamples, small: Mapping[int, Pixels]) -> None:
    """Draw the best images for some captions, and the best captions for some images."""
    title = f"{shown.data}: search among {shown.samples:,} images and {shown.captions:,} captions"
    height = 1.35
    with sheet(path, 15.2, max(len(shown.by_caption), len(shown.by_image)) * height + 1.0, title) as page:
        page.text(2.3, 0.65, "caption → best images (its own: green)", color=MUTED)
        page.text(9.5, 0.65, "image → best captions (its own: green)", color=MUTED)
        for place, search in enumerate(shown.by_caption):
            y = 0.85 + place * height
            page.text(2.15, y + 0.6, wrapped(search.caption, 28, 5), ha="right")
            for column, (image, right) in enumerate(search.found):
                page.image(2.3 + 1.3 * column, y, 1.2, small.get(image.id), GREEN if right else GRAY)
        for place, by_image in enumerate(shown.by_image):
            y = 0.85 + place * height
            page.image(9.5, y, 1.2, small.get(by_image.image.id), MUTED)
            for line, (caption, right) in enumerate(by_image.found):
                style = {"color": GREEN, "weight": "bold"} if right else {"color": TEXT}
                page.text(10.85, y + 0.12 + 0.24 * line, wrapped(caption, 60, 1), **style)


def _bars(page: Page, x: float, y: float, example: ClassifiedExample, probable: bool) -> None:
    """Draw the best classes as bars from (x, y) down, and the true one below if it is not among them."""
    full = 1.0 if probable else max(1e-6, max(value for _, value in example.best))
    for place, (name, value) in enumerate(example.best):
        top, right = y + 0.25 * place, name == example.label
        page.bar(x, top + 0.015, 2.7 * max(0.0, value) / full, 0.22, GREEN_BAR if right else GRAY_BAR)
        text = f"{wrapped(name, 32, 1)}  {f'{100 * value:.0f} %' if probable else f'{value:.2f}'}"
        page.text(x + 0.05, top + 0.125, text, weight="bold" if right else "normal")
    if example.label not in [name for name, _ in example.best]:
        text = f"{wrapped(example.label, 26, 1)}  (rank {example.rank:,})"
        page.text(x + 0.05, y + 1.375, text, color=GREEN, weight="bold")
