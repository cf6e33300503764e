"""Images made to break readers: mutated sizes, flipped bits, cuts and thousands of tiny parts, in every format."""

import io
import random
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

SIZES = (0, 1, 2, 7, 255, 999, 4096, 16_383, 16_384, 40_000, 65_535, 65_536, 2**24, 2**31 - 1, 2**32 - 1)
"""Lengths that are put where a format may keep one."""


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def qoi(width: int, height: int, channels: int, content: bytes) -> bytes:
    """A QOI image."""
    return b"qoif" + struct.pack(">IIBB", width, height, channels, 0) + content + bytes(7) + b"\1"


def rle_bmp(width: int, height: int, content: bytes) -> bytes:
    """A BMP with run-length encoding of 8 bits."""
    at = 14 + 40 + 1024
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(content), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", at + len(content), 0, 0, at) + info + bytes(range(256)) * 4 + content


def tiled_tiff(width: int, height: int, tile: tuple[int, int], offsets: int = 1, compression: int = 8) -> bytes:
    """A gray TIFF of tiles that all lie at one place."""
    content = zlib.compress(bytes(tile[0] * tile[1]) if tile[0] * tile[1] < 1 << 24 else b"")
    entries = [
        (256, width),
        (257, height),
        (258, 8),
        (259, compression),
        (262, 1),
        (277, 1),
        (322, tile[0]),
        (323, tile[1]),
    ]
    head = 8 + 2 + 12 * (len(entries) + 2) + 4
    lists = b"".join(struct.pack("<I", value) * offsets for value in (head + 8 * offsets, len(content)))
    ifd = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    for number, tag in enumerate((324, 325)):
        value = head + 4 * offsets * number if offsets > 1 else (head + 8, len(content))[number]
        ifd += struct.pack("<HHII", tag, 4, offsets, value)
    return b"II*\0" + struct.pack("<IH", 8, len(entries) + 2) + ifd + bytes(4) + lists + content


@cache
def sound_images() -> dict[str, bytes]:
    """Small images of every format and of their usual kinds."""
    rows, columns = np.mgrid[:48, :64]
    pixels = np.stack([rows * 5, columns * 3, (rows ^ columns) * 4], -1).astype(np.uint8)
    pixels[:20] ^= np.random.default_rng(0).integers(0, 64, (20, 64, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    gray, palette, wide = rgb.convert("L"), rgb.quantize(16), Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    clear = rgb.copy()
    clear.putalpha(gray)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "jpeg": _encoded(rgb, "JPEG", exif=exif),
        "jpeg progressive": _encoded(rgb, "JPEG", progressive=True, subsampling=0),
        "jpeg gray": _encoded(gray, "JPEG"),
        "jpeg cmyk": _encoded(rgb.convert("CMYK"), "JPEG"),
        "png": _encoded(rgb, "PNG", exif=exif),
        "png palette": _encoded(palette, "PNG"),
        "png wide": _encoded(wide, "PNG"),
        "png animated": _encoded(clear, "PNG", save_all=True, append_images=[clear.rotate(9)]),
        "webp": _encoded(rgb, "WEBP"),
        "webp lossless": _encoded(clear, "WEBP", lossless=True, exif=exif.tobytes()),
        "webp animated": _encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(9)]),
        "gif": _encoded(rgb, "GIF"),
        "gif animated": _encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(9)], comment=b"c" * 300),
        "bmp": _encoded(rgb, "BMP"),
        "bmp palette": _encoded(palette, "BMP"),
        "bmp rle": rle_bmp(64, 48, (b"\x40\x05\0\0" * 48) + b"\0\1"),
        "tiff": _encoded(rgb, "TIFF"),
        "tiff lzw": _encoded(clear, "TIFF", compression="tiff_lzw"),
        "tiff deflate": _encoded(wide, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": _encoded(rgb, "TIFF", compression="jpeg"),
        "tiff group4": _encoded(gray.convert("1"), "TIFF", compression="group4"),
        "tiff tiled": tiled_tiff(64, 48, (64, 48)),
        "avif": _encoded(rgb, "AVIF", speed=10),
        "avif clear": _encoded(clear, "AVIF", speed=10, exif=exif.tobytes()),
        "jp2": _encoded(rgb, "JPEG2000"),
        "j2k": _encoded(gray, "JPEG2000", no_jp2=True, tile_size=(32, 32)),
        "ppm": _encoded(rgb, "PPM"),
        "pgm wide": _encoded(wide, "PPM"),
        "pgm 12 bits": b"P5 64 48 4095\n" + bytes(range(16)) * 384,
        "ppm plain": b"P3 # comment\n8 8 255\n" + b"12 3 4\n" * 64,
        "pbm plain": b"P1\n8 8\n" + b"0 1 " * 32,
        "qoi": qoi(64, 48, 3, b"\xfe\1\2\3" + b"\x6a\x80\x55" * 800 + b"\xfd" * 50),
        "qoi clear": qoi(64, 48, 4, b"\xff\1\2\3\4" * 3072),
    }


def _png_chunks(image: bytes) -> Iterator[bytes]:
    at = 8
    while at + 12 <= len(image):
        length = int.from_bytes(image[at : at + 4], "big")
        yield image[at + 4 : at + 8 + length]
        at += 12 + length


def resealed(image: bytes) -> bytes:
    """A PNG with right lengths and checksums; others as they are."""
    if not image.startswith(b"\x89PNG\r\n\x1a\n"):
        return image
    return image[:8] + b"".join(
        struct.pack(">I", max(0, len(chunk) - 4)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in _png_chunks(image)
    )


def hostile_image(seed: int) -> tuple[str, bytes]:
    """A kind of image, mutated in one to three ways; the same one for each seed."""
    rng = random.Random(seed)
    name, sound = sorted(sound_images().items())[seed % len(sound_images())]
    image = bytearray(sound)
    for _ in range(rng.choice([1, 1, 2, 3])):
        _mutate(rng, image)
    return name, resealed(bytes(image)) if rng.random() < 0.8 else bytes(image)


def _mutate(rng: random.Random, image: bytearray) -> None:
    if len(image) < 16:
        return
    head = rng.randrange(2, min(len(image), rng.choice([40, 120, 600])))
    match rng.randrange(8):
        case 0 | 1 | 2:  # a length in the header
            value, width = rng.choice(SIZES), rng.choice([2, 4])
            image[head : head + width] = (value % 256**width).to_bytes(width, rng.choice(["big", "little"]))
        case 3:
            image[head] ^= 1 << rng.randrange(8)
        case 4:
            for _ in range(rng.choice([1, 8, 64])):
                image[rng.randrange(len(image))] = rng.randrange(256)
        case 5:
            del image[rng.randrange(len(image)) :]
        case 6:  # a part again and again
            length = rng.choice([2, 3, 4, 8, 12, 30])
            image[head:head] = image[head : head + length] * rng.choice([1, 100, 3000])
        case _:
            begin = rng.randrange(len(image))
            del image[begin : begin + rng.choice([1, 4, 50])]
