"""What is looked for: words, or an image."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmssl.data.shards import IMAGES
from mmssl.errors import UserError
from mmssl.inference import ImageInput, Model


def encode_query(model: Model, query: ImageInput) -> npt.NDArray[np.float32]:
    """The unit vector of words or of an image, float32 [1, D].

    Args:
        query: words, the file of an image, or an image.

    Raises:
        UserError: a file is no image; there are words that end like the name of one, and no such file; or there is
            nothing.
        DecodeError: an image that is no file cannot be decoded.
    """
    if not isinstance(query, str) or _is_file(query):
        return model.encode_image(query).numpy()
    if Path(query).suffix.lower().lstrip(".") in IMAGES:
        raise UserError(f"no image at {query}; correct the path, or search for other words")
    if not query.strip():
        raise UserError("the query is empty; give words or an image")
    return model.encode_text(query).numpy()


def _is_file(words: str) -> bool:
    try:
        return Path(words).is_file()
    except OSError:  # too long for a file's name
        return False
