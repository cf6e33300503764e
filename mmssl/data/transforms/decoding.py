"""Encoded images to RGB pixels: JPEG by libjpeg-turbo (simplejpeg), every other format by Pillow.

Formats are recognised by their first bytes, and only plain raster formats are read: Pillow's `Image.open` would also
try formats that call external programs.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile, ImageOps

from mmssl.data.transforms.caps import (
    MAX_SEGMENTS,
    SLOW_DECODERS,
    CostlyError,
    CountedFile,
    DecodeError,
    check_claims,
    check_scans,
    check_size,
    check_slow,
)
from mmssl.data.transforms.formats import describe_unread, find_reader

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 89_478_485
"""Default cap on an image's size in pixels: from here on Pillow warns of a decompression bomb. Decoding one that large
takes up to 1.5 GB."""
REDUCTIONS = (8, 4, 2)
"""Factors by which a JPEG can be decoded smaller (DCT scaling), largest first."""

_DEPTHS = (8, 10, 12, 14, 16)
"""Bits per pixel that cameras and scanners store in wider integers."""
_ROWS = 64
_EXIF_ORIENTATION = 0x0112
_EXIF_SHORT = 3


@dataclass(frozen=True)
class Header:
    """Format and size of an image, known before decoding."""

    format: str
    """Pillow's name: JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, JPEG2000, PPM or QOI."""
    width: int
    """Displayed width in pixels, after the EXIF orientation."""
    height: int
    """Displayed height in pixels."""
    orientation: int = 1
    """EXIF orientation still to be applied, 1 to 8."""
    reducible: bool = False
    """True if the image can be decoded at 1/2, 1/4 or 1/8 of its size."""


def read_header(image: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Read format, displayed size and orientation of an encoded image, without decoding it.

    Raises:
        DecodeError: unknown format, broken header, or no pixels.
        CostlyError: more than `max_pixels`, or an image that would take too much time or memory in another way.
    """
    is_jpeg = image[:3] == b"\xff\xd8\xff"
    header = _jpeg_header(image) if is_jpeg else None
    if header is None:
        check_claims(image, max_pixels)
        opened = _open(image)
        header = _pillow_header(opened)
        if _is_slow(opened):
            check_slow(image, header.width, header.height)
    check_size(header.width, header.height, max_pixels)
    if is_jpeg:
        check_scans(image, header.width * header.height)
    return header


def decode(image: bytes, header: Header | None = None, reduce: int = 1) -> Pixels:
    """Decode to upright RGB, uint8 [height, width, 3]: transparency over white, first frame of an animation.

    Args:
        header: from `read_header`. None: it is read here, with the default pixel cap.
        reduce: 2, 4 or 8 decode a JPEG faster at 1/2, 1/4 or 1/8 of its size, rounded up. Other formats (see
            `header.reducible`) and damaged JPEGs are decoded at full size.

    Raises:
        DecodeError: the data is broken or truncated, or its pixels have no RGB form.
    """
    header = read_header(image) if header is None else header
    pixels = _decode_jpeg(image, header, reduce) if header.reducible else None
    if pixels is None:
        pixels = _decode_pillow(image)
    return _upright(pixels, header.orientation)


def pillow_pixels(image: Image.Image) -> Pixels:
    """Upright RGB pixels of a Pillow image, uint8 [height, width, 3]: as its file would be decoded.

    Raises:
        DecodeError: the image is broken or cut, or its pixels have no RGB form.
    """
    try:
        # Loaded first: for TIFF, Pillow applies the orientation then, and removes it.
        image.load()
        return rgb_pixels(ImageOps.exif_transpose(image))
    except DecodeError:
        raise
    except Exception as error:  # as in _open
        raise _broken(error) from error


def rgb_pixels(image: Image.Image) -> Pixels:
    """RGB pixels of a Pillow image, uint8 [height, width, 3], with transparency over white.

    Raises:
        DecodeError: the pixels are floats without a range.
    """
    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image))
    if image.mode == "F":
        return _from_floats(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image)
        return np.array(background)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_integers(gray: npt.NDArray[np.integer[Any]]) -> Pixels:
    """RGB of gray integers [H, W] of more than 8 bits. Pillow's own conversion would clip at 255.

    White is the largest value of the fewest bits that hold all pixels: 8, 10, 12, 14 or 16. Wider and negative values,
    such as Hounsfield units, are scaled from the smallest to the largest of the image.

    Works on a few rows at a time: wide copies of a whole image would take many times its memory.
    """
    low, high = int(gray.min()), int(gray.max())
    white = next((2**bits - 1 for bits in _DEPTHS if high < 2**bits), None)
    black, white = (0, white) if low >= 0 and white is not None else (low, high)
    span = max(1, white - black)
    narrow = np.empty(gray.shape, np.uint8)
    for top in range(0, len(gray), _ROWS):
        rows = gray[top : top + _ROWS].astype(np.int64) - black
        narrow[top : top + _ROWS] = (rows * 255 + span // 2) // span
    return np.repeat(narrow[:, :, None], 3, axis=2)


def _from_floats(gray: npt.NDArray[np.floating[Any]]) -> Pixels:
    """RGB of gray floats [H, W]: 0 to 1 is black to white; other ranges are scaled from the smallest to the largest.

    Raises:
        DecodeError: the pixels are all equal, or some are not finite.
    """
    low, high = float(gray.min()), float(gray.max())
    if not (np.isfinite([low, high]).all() and low < high):
        raise DecodeError("the image has floating-point pixels without a range; convert it to 8 or 16 bits")
    black, white = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    narrow = np.empty(gray.shape, np.uint8)
    for top in range(0, len(gray), _ROWS):
        rows = gray[top : top + _ROWS].astype(np.float64)
        narrow[top : top + _ROWS] = np.rint((rows - black) / (white - black) * 255)
    return np.repeat(narrow[:, :, None], 3, axis=2)


def _jpeg_header(image: bytes) -> Header | None:
    """Header of a JPEG; None if libjpeg-turbo rejects it or cannot convert it to RGB."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    orientation = _jpeg_orientation(image)
    if orientation >= 5:
        width, height = height, width
    return Header("JPEG", width, height, orientation, reducible=True)


def _jpeg_orientation(image: bytes) -> int:
    """EXIF orientation from the JPEG markers before the pixel data."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        if at + 4 > len(image) or image[at] != 0xFF:
            break
        marker = image[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:  # start of scan
            break
        length = int.from_bytes(image[at + 2 : at + 4], "big")
        if marker == 0xE1 and image[at + 4 : at + 10] == b"Exif\x00\x00":
            return _exif_orientation(image[at + 10 : at + 2 + length])
        at += 2 + length
    return 1


def _exif_orientation(tiff: bytes) -> int:
    """Orientation of the first EXIF directory; 1 (upright) if it is missing or invalid."""
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(min(entries, 512)):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, at + 2 + 12 * entry)
            if tag == _EXIF_ORIENTATION:
                return value if kind == _EXIF_SHORT and 1 <= value <= 8 else 1
    except struct.error:  # the directory is truncated; the image itself may be fine
        return 1
    return 1


def _open(image: bytes) -> ImageFile.ImageFile:
    """Open an image with the Pillow reader that matches its first bytes. Pixels are not read yet."""
    reader = find_reader(image)
    if reader is None:
        raise DecodeError(describe_unread(image))
    try:
        # Not Image.open: the pixel cap is the caller's, not Pillow's global one.
        return reader(CountedFile(image))
    except DecodeError:
        raise
    except Exception as error:  # Pillow's readers raise any kind of exception on broken bytes
        raise _broken(error) from error


def _is_slow(image: ImageFile.ImageFile) -> bool:
    """True if Pillow decodes the opened image in Python."""
    return any(tile.codec_name in SLOW_DECODERS for tile in image.tile)


def _pillow_header(image: Image.Image) -> Header:
    width, height = image.size
    exif = image.info.get("exif")
    orientation = 1
    # Pillow applies the orientation of a TIFF itself. EXIF after a PNG's pixels is unknown before decoding.
    if isinstance(exif, bytes) and image.format != "TIFF":
        orientation = _exif_orientation(exif.removeprefix(b"Exif\x00\x00"))
    if orientation >= 5:
        width, height = height, width
    return Header(str(image.format), width, height, orientation)


def _decode_jpeg(image: bytes, header: Header, reduce: int) -> Pixels | None:
    """Pixels by libjpeg-turbo; None on any error, since Pillow may still decode the image."""
    assert reduce == 1 or reduce in REDUCTIONS, reduce
    sides = (header.height, header.width) if header.orientation < 5 else (header.width, header.height)
    height, width = (-(-side // reduce) for side in sides)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(image, min_height=height, min_width=width, min_factor=reduce)
    except ValueError:
        return None
    return pixels


def _decode_pillow(image: bytes) -> Pixels:
    opened = _open(image)
    if isinstance(opened.fp, CountedFile):
        opened.fp.begin_pixels(slow=_is_slow(opened))
    try:
        if opened.tile and opened.tile[0].codec_name == "ppm":
            return _decode_portable(opened, image)
        opened.load()
        return rgb_pixels(opened)
    except DecodeError:
        raise
    except Exception as error:  # as in _open
        raise _broken(error) from error


def _decode_portable(opened: ImageFile.ImageFile, image: bytes) -> Pixels:
    """Pixels of a binary PGM or PPM whose white is not 255, for which Pillow takes seconds per million pixels."""
    (width, height), bands, (tile,) = opened.size, len(opened.getbands()), opened.tile
    assert isinstance(tile.args, tuple), tile
    white = int(tile.args[1])
    kind: np.dtype[np.integer[Any]] = np.dtype(np.uint8 if white < 256 else ">u2")
    values: npt.NDArray[np.integer[Any]] = np.frombuffer(image, kind, width * height * bands, tile.offset).reshape(
        height, width, bands
    )
    table = ((np.arange(white + 1) * 510 + white) // (2 * white)).astype(np.uint8)
    narrow = table.take(values, mode="clip")
    return narrow if bands == 3 else np.repeat(narrow, 3, axis=2)


def _broken(error: Exception) -> DecodeError:
    if isinstance(error, Image.DecompressionBombError):
        return CostlyError("the image claims more pixels than any format reader takes")
    return DecodeError(f"the image is broken or cut: {' '.join(str(error).split()) or type(error).__name__}")


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Apply the EXIF orientation (EXIF 2.32, tag 0x0112)."""
    if orientation == 1:
        return pixels
    if orientation >= 5:  # stored transposed
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
