"""Small images inside the page: data URIs, and one sheet for the many of a map."""

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmssl.data.transforms import Pixels, decoding

SIDE = 96
"""Longest side of a small image, in pixels."""
SHEET_SIDE = 40
"""Side of the images of a sheet."""
SHEET_COLUMNS = 25


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
    """All images in one, SHEET_COLUMNS a row, each fitted into a white square of SHEET_SIDE, as a data URI."""
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
