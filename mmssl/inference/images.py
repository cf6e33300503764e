"""Images in any form that Python users have."""

from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmssl.data.transforms import decoding, views
from mmssl.errors import UserError

ImageInput = str | Path | bytes | IO[bytes] | Image.Image | np.ndarray[Any, Any] | Tensor
"""A file's path, an encoded image or an open file of one, a PIL image, or pixels (array [H, W, 3], tensor [3, H, W]):
uint8, or floats from 0 to 1."""


def as_image_list(images: ImageInput | Iterable[ImageInput]) -> list[ImageInput]:
    """One image, several of them, or an array [N, H, W, 3] or tensor [N, 3, H, W], as a list.

    Open files are read: their images are encoded bytes.

    Raises:
        UserError: an entry is no image in any form.
    """
    if isinstance(images, Tensor | np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Iterable) and not isinstance(images, _ONE_IMAGE) and not hasattr(images, "read"):
        return [image_content(image) for image in images]
    return [image_content(images)]


_ONE_IMAGE = (str, Path, bytes, bytearray, memoryview, Image.Image)


def image_content(image: Any) -> Any:
    """An image as `Model.render` takes it: the bytes of an open file.

    Raises:
        UserError: it is no image in any form.
    """
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | Path | bytes | Image.Image | np.ndarray | Tensor):
        return image
    content = image.read() if hasattr(image, "read") else None
    if not isinstance(content, bytes):
        raise UserError(
            f"expected an image (a path, bytes, an open binary file, a PIL image, an array or a tensor), found a "
            f"{type(image).__name__}"
        )
    return content


def pixels_of(image: ImageInput) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB pixels [H, W, 3] of an image in any form.

    Raises:
        DecodeError: it cannot be decoded.
        OSError: the file cannot be read.
    """
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    content = image_content(image)
    return decoding.decode(content) if isinstance(content, bytes) else views.as_pixels(content)
