"""Caps on images, for all formats alike: checked before a pixel is decoded and before a reader takes memory."""

import io
import struct
from collections.abc import Iterator

import numpy as np

MAX_SIDE = 65_535
"""Cap on both sides in pixels, as in JPEG."""
MAX_SLOW_PIXELS = 2_000_000
"""Cap on images that Pillow decodes in Python, at up to 4 seconds per million pixels."""
_MAX_SCANS = 100
_MAX_SCANNED = 2_000_000_000
"""Scans of a progressive JPEG, and their number times pixels. Ten scans are usual. A few bytes of one may take the
time of a complete image."""
_START_OF_SCAN = b"\xff\xda"
"""A marker, which cannot occur within a scan."""
MAX_SEGMENTS = 10_000
"""Parts of a header: segments, chunks, boxes, tags."""
SLOW_DECODERS = ("qoi", "ppm_plain", "bmp_rle")
"""Pillow's decoders that are written in Python and are used here."""
_READS, _SLOW_READS = 1_000_000, 4_500_000
_MAX_COMMENTS = 100
_MAX_BLOCKS = 400_000
"""Strips or tiles of a TIFF. One with 16 x 16 pixels each has 350,000."""
_MAX_TILES = 16_384
"""Tiles of a JPEG 2000 image. Its reader keeps kilobytes for each."""
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_STRIPS, _TIFF_TILES = 322, 323, 273, 324
_TIFF_NUMBERS = {3: "H", 4: "I", 16: "Q"}
_JP2 = b"\x00\x00\x00\x0cjP  "
_J2K = b"\xff\x4f\xff\x51"


class DecodeError(ValueError):
    """An unusable image. The message is one line with the reason."""

    costly = False
    """True if the image may be sound, but would take too much memory or time."""


class CostlyError(DecodeError):
    """An image that would take too much memory or time."""

    costly = True


class CountedFile(io.BytesIO):
    """The bytes of an image, whose reads are counted.

    Pillow parses headers in Python with a read for each part, so millions of tiny parts would take minutes.
    """

    def __init__(self, image: bytes) -> None:
        super().__init__(image)
        self.reads_left = MAX_SEGMENTS

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises CostlyError if there were too many reads."""
        self.reads_left -= 1
        if self.reads_left < 0:
            raise CostlyError("the image is cut into too many small parts; save it anew")
        return super().read(size)

    def begin_pixels(self, *, slow: bool) -> None:
        """Allow the reads of a decoder; those in Python read byte by byte."""
        self.reads_left = _SLOW_READS if slow else _READS


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises DecodeError if an image has no pixels, CostlyError if it has more than allowed."""
    if width < 1 or height < 1:
        raise DecodeError(f"the image has {width} x {height} pixels; at least 1 x 1 is needed")
    if width * height > max_pixels:
        raise CostlyError(
            f"the image has {width} x {height} pixels, more than the limit of {max_pixels:,} (data.max_pixels)"
        )
    if max(width, height) > MAX_SIDE:
        raise CostlyError(f"the image has {width} x {height} pixels; its sides may have {MAX_SIDE:,} at most")


def check_scans(image: bytes, pixels: int) -> None:
    """Raises CostlyError if a JPEG has too many scans."""
    # `bytes.count` of two bytes takes eight times as long: a sixth of the decoding of a small photograph.
    codes = np.frombuffer(image, np.uint8)
    scans = int(np.count_nonzero((codes[:-1] == _START_OF_SCAN[0]) & (codes[1:] == _START_OF_SCAN[1])))
    if scans > _MAX_SCANS or scans * pixels > _MAX_SCANNED:
        raise CostlyError(f"the JPEG has {scans} scans; save it anew")


def check_slow(image: bytes, width: int, height: int) -> None:
    """Raises CostlyError if an image would take Pillow's decoders in Python too long."""
    if image.count(b"#") > _MAX_COMMENTS + len(image) // 64:
        raise CostlyError("the image has too many comments; convert it to JPEG or PNG")
    if width * height > MAX_SLOW_PIXELS:
        raise CostlyError(
            f"the image has {width} x {height} pixels in a format that is read slowly, for which the limit is "
            f"{MAX_SLOW_PIXELS:,}; convert it to JPEG or PNG"
        )


def check_claims(image: bytes, max_pixels: int) -> None:
    """Check the sizes for which readers take memory when they open an image or one of its parts.

    Raises:
        CostlyError: a size is beyond its cap.
    """
    if image[:4] == b"RIFF":
        sizes = _webp_sizes(image)
    elif image[:2] in (b"II", b"MM"):
        sizes = _tiff_sizes(image)
    elif image.startswith((_JP2, _J2K)):
        sizes = _jpeg2000_sizes(image)
    else:
        return
    try:
        for width, height in sizes:
            check_size(width, height, max_pixels)
    except struct.error:  # it ends within its header, which the reader says better
        return


def _webp_sizes(image: bytes) -> Iterator[tuple[int, int]]:
    """The canvas (RFC 9649), for which the reader takes memory at once."""
    kind = image[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(image[at : at + 3], "little") for at in (24, 27))
        yield width, height
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", image, 21)
        yield (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", image, 26)
        yield width & 0x3FFF, height & 0x3FFF


def _tiff_sizes(image: bytes) -> Iterator[tuple[int, int]]:
    """The tile of a TIFF, which is decoded as a whole even if the image is smaller (TIFF 6.0, BigTIFF)."""
    order, is_big = "<" if image[:2] == b"II" else ">", image[2:4] in (b"+\0", b"\0+")
    (at,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", image, 8 if is_big else 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", image, at)
    at += 8 if is_big else 2
    size, entry = (20, "HHQ") if is_big else (12, "HHI")
    if count > MAX_SEGMENTS:
        raise CostlyError(f"the image has {count:,} tags")
    sides = {_TIFF_WIDTH: 1, _TIFF_HEIGHT: 1}
    for number in range(count):
        tag, kind, values = struct.unpack_from(order + entry, image, at + size * number)
        if tag in (_TIFF_STRIPS, _TIFF_TILES) and values > _MAX_BLOCKS:
            raise CostlyError(f"the image is cut into {values:,} parts; save it anew")
        if tag in sides and kind in _TIFF_NUMBERS:
            place = at + size * number + struct.calcsize(order + entry)
            (sides[tag],) = struct.unpack_from(order + _TIFF_NUMBERS[kind], image, place)
    yield max(1, sides[_TIFF_WIDTH]), max(1, sides[_TIFF_HEIGHT])


def _jpeg2000_sizes(image: bytes) -> Iterator[tuple[int, int]]:
    """The size in the codestream, which may differ from that of the file's header (ISO 15444-1, A.5.1 and I.4)."""
    at = 0 if image.startswith(_J2K) else _codestream(image)
    if at is None or image[at : at + 4] != _J2K:
        return
    right, bottom, left, top, width, height, first_left, first_top = struct.unpack_from(">8I", image, at + 8)
    yield right - left, bottom - top
    tiles = -(-(right - first_left) // max(1, width)) * -(-(bottom - first_top) // max(1, height))
    if not 0 < tiles <= _MAX_TILES:
        raise CostlyError(f"the image is cut into {tiles:,} tiles; save it anew")


def _codestream(image: bytes) -> int | None:
    """Offset of the first codestream of a JP2 file, or None."""
    at = 0
    for _ in range(MAX_SEGMENTS):
        length, kind = struct.unpack_from(">I4s", image, at)
        header = 8
        if length == 1:
            (length,), header = struct.unpack_from(">Q", image, at + 8), 16
        if kind == b"jp2c":
            return at + header
        if length < header:
            return None
        at += length
    raise CostlyError("the image is cut into too many small parts; save it anew")
