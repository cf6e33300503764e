"""The map that places images by their embeddings."""

import base64
import importlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmssl.apps.report.run_reader import Name
from mmssl.apps.report.wording import brief
from mmssl.data.transforms import DecodeError, Pixels, decoding
from mmssl.evaluate import datasets, encode
from mmssl.inference import Model
from mmssl.plotting import shrink
from mmssl.types import Sample

MAP_POINTS = 600
SHEET_SIDE = 40
"""Side of the images of a sheet, in pixels."""
SHEET_COLUMNS = 25

Points = NDArray[np.float64]
"""Positions of images, [N, 2]."""


@dataclass(frozen=True)
class Space:
    """The map: points, with the position of each image in the sheet of thumbnails."""

    method: str
    sheet: str
    points: list[dict[str, Any]]


def draw_space(model: Model, labels: Mapping[Name, str], predictions: Mapping[Name, str], limit: int) -> Space:
    """Place up to `limit` evenly spaced images so that images with similar embeddings are close.

    Args:
        labels: the class or the caption of each image.
        predictions: the predicted class of each image. Empty: the nearest of the captions is taken.
    Raises:
        UserError: no image can be used.
    """
    names = list(labels)[:: max(1, -(-len(labels) // min(limit, MAP_POINTS)))]
    small: dict[int, Pixels] = {}

    def drawn() -> Iterator[Sample]:
        for sample in datasets.read_images(Sample(place, *name, b"", {}) for place, name in enumerate(names)):
            with suppress(DecodeError):
                small[sample.id] = shrink(decoding.decode(sample.image), SHEET_SIDE)
                yield sample

    embedded = encode.encode_images(model, drawn())
    names = [names[sample.id] for sample in embedded.samples]
    texts = [labels[name] for name in names]
    guesses = [predictions[name] for name in names] if predictions else _nearest(model, embedded.features, texts)
    places, method = plane(embedded.features)
    points = [
        {
            "x": round(float(x), 4),
            "y": round(float(y), 4),
            "label": brief(label),
            "guess": brief(guess),
            "right": guess == label,
        }
        for label, guess, (x, y) in zip(texts, guesses, places, strict=True)
    ]
    return Space(method, sheet([small[sample.id] for sample in embedded.samples]), points)


def _nearest(model: Model, features: Tensor, captions: Sequence[str]) -> list[str]:
    """The caption nearest to each image, features [N, D]."""
    best = (features @ encode.encode_texts(model, captions).T).argmax(1)
    return [captions[place] for place in best.tolist()]


def uri(pixels: Pixels, quality: int = 82) -> str:
    """An image as a data URI of WebP."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "WEBP", quality=quality, method=5)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def sheet(images: Sequence[Pixels]) -> str:
    """All images, of at most SHEET_SIDE pixels a side, in one data URI of white squares, SHEET_COLUMNS per row."""
    rows = -(-len(images) // SHEET_COLUMNS)
    canvas = Image.new("RGB", (SHEET_COLUMNS * SHEET_SIDE, rows * SHEET_SIDE), "white")
    for place, pixels in enumerate(images):
        small = Image.fromarray(pixels)
        left, top = place % SHEET_COLUMNS * SHEET_SIDE, place // SHEET_COLUMNS * SHEET_SIDE
        canvas.paste(small, (left + (SHEET_SIDE - small.width) // 2, top + (SHEET_SIDE - small.height) // 2))
    return uri(np.asarray(canvas), quality=72)


def plane(features: Tensor) -> tuple[Points, str]:
    """Positions in 0..1 [N, 2] of unit-length embeddings [N, D], and the name of the method: t-SNE if scikit-learn is
    installed and there are enough points, otherwise the two main directions."""
    perplexity = min(30, (len(features) - 1) // 3)
    if perplexity < 5:
        return _scaled(main_directions(features)), "PCA"
    try:
        manifold = importlib.import_module("sklearn.manifold")
    except ImportError:
        return _scaled(main_directions(features)), "PCA (with scikit-learn installed it is t-SNE)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = manifold.TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=0).fit_transform(
            features.numpy()
        )
    return _scaled(np.asarray(found, dtype=np.float64)), "t-SNE"


def main_directions(features: Tensor) -> Points:
    """Coordinates along the two directions of the largest variance, [N, 2]."""
    centred = (features - features.mean(0)).double()
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    found: Points = (centred @ directions.T).numpy()
    return found if found.shape[1] == 2 else np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def _scaled(points: Points) -> Points:
    low, high = points.min(0), points.max(0)
    scaled: Points = (points - low) / np.maximum(high - low, 1e-12)
    return scaled
