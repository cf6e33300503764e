"""Small images of the page as data URIs, and the map that places images by their embeddings."""

import base64
import importlib
import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmssl.data.transforms import Pixels, decoding

SIDE = 96
"""Longest side of a thumbnail, in pixels."""
SHEET_SIDE = 40
"""Side of the images of a sheet, in pixels."""
SHEET_COLUMNS = 25

Points = NDArray[np.float64]
"""Positions of images, [N, 2]."""


def thumbnail(image: bytes) -> Pixels:
    """An image shrunk to at most SIDE, uint8 [h, w, 3]. Raises DecodeError."""
    small = Image.fromarray(decoding.decode(image))
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(small)


def uri(pixels: Pixels | Tensor, quality: int = 82) -> str:
    """An image, uint8 [h, w, 3] (array) or [3, h, w] (tensor), as a data URI of WebP."""
    array = pixels.permute(1, 2, 0).cpu().numpy() if isinstance(pixels, Tensor) else pixels
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, "WEBP", quality=quality, method=5)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def sheet(images: Sequence[Pixels]) -> str:
    """All images in one data URI, SHEET_COLUMNS per row, each fitted into a white square of SHEET_SIDE pixels."""
    rows = -(-len(images) // SHEET_COLUMNS)
    canvas = Image.new("RGB", (SHEET_COLUMNS * SHEET_SIDE, rows * SHEET_SIDE), "white")
    for place, pixels in enumerate(images):
        small = Image.fromarray(pixels)
        small.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
        left, top = place % SHEET_COLUMNS * SHEET_SIDE, place // SHEET_COLUMNS * SHEET_SIDE
        canvas.paste(small, (left + (SHEET_SIDE - small.width) // 2, top + (SHEET_SIDE - small.height) // 2))
    return uri(np.asarray(canvas), quality=72)


def shrunk(image: Tensor, side: int = 128) -> Tensor:
    """An image [3, S, S] no larger than `side`."""
    if image.shape[-1] <= side:
        return image
    small = F.interpolate(image[None].float(), size=(side, side), mode="bilinear", antialias=True)[0]
    return small.round().clamp(0, 255).to(image.dtype)


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
