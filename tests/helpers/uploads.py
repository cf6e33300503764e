"""Images to upload, sound and hostile."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def image(width: int = 40, height: int = 30, kind: str = "PNG", seed: int = 0, **options: Any) -> bytes:
    """A sound image of noise; `options` as of Pillow's writer."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that claims, and has, very many black pixels."""
    rows = zlib.compressobj(9)
    line = b"\0" * (1 + -(-width // 8))
    packed = b"".join(rows.compress(line) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def sent(content: bytes, name: str = "image.png") -> dict[str, Any]:
    """The `files` of an upload."""
    return {"image": (name, content, "image/png")}


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
