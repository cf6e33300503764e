"""Encoded images made for the tests: photographs that ship with scikit-image, in any format."""

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage import data

Array = npt.NDArray[Any]


@cache
def photo(height: int = 300, width: int = 400) -> Image.Image:
    """Part of a photograph: smooth areas, edges and texture."""
    return Image.fromarray(data.astronaut()[:height, :width])  # type: ignore[no-untyped-call]


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def orientation(value: int) -> Image.Exif:
    """An EXIF block with nothing but the orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def png_of(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A one-bit PNG whose header says `width` x `height`, whatever its compressed `pixels` hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def psnr(a: Array, b: Array) -> float:
    """Peak signal-to-noise ratio in dB of two images with values 0 to 255."""
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def mean_difference(a: Array, b: Array) -> float:
    """Mean absolute difference of two images in values of 0 to 255."""
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())
