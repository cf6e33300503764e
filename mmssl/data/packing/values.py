"""Values of table cells: images (paths, URLs, base64, bytes) and captions (texts, lists of texts)."""

import ast
import base64
import binascii
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mmssl.data.packing.records import RecordError
from mmssl.data.shards import IMAGES
from mmssl.types import CAPTION_FIELDS

_UNREADABLE = ("heic", "heif", "svg", "jxl", "psd", "ico")
"""Extensions of images that are recognised in a table, and named when they are left out."""
_IMAGE_NAME = re.compile(rf"[^\n]*[^\s/\\]\.({'|'.join((*IMAGES, *_UNREADABLE))})(#\d+)?", re.IGNORECASE)
"""The name of an image, perhaps with the number of a caption behind it, as Flickr8k's `a.jpg#0`."""
_WEB = re.compile(r"(https?|ftp|s3|gs)://\S+", re.IGNORECASE)
_BASE64 = re.compile(r"data:image/|/9j/|iVBORw0KGgo|R0lGOD|UklGR|(Qk[0-9A-Za-z]|SUkq|TU0A)[\w+/=\s-]{40}")
"""Base64 of an image, known by the first bytes of its format, perhaps as a data URL."""
_MISSING = {"", "nan", "NaN", "None", "null", "NULL", "<NA>", "N/A", "#N/A"}
"""Words that programs write in place of a missing value."""
_SHOWN = 80
"""Characters of a value that a message shows."""
LONGEST_PATH = 4096
"""Characters of a path. Longer texts in an image column are base64."""

DOWNLOAD = (
    "download them with img2dataset, and give its shards (img2dataset --url_list TABLE --url_col {url} --caption_col "
    "{caption} --output_format webdataset --output_folder FOLDER)"
)


def is_web(value: object) -> bool:
    """True for the URL of something that would have to be downloaded."""
    return isinstance(value, str) and _WEB.fullmatch(value.strip()) is not None


def is_image(value: object) -> bool:
    """True for bytes, for text that is the name, the file URL or the base64 of an image, and for a list of these."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(map(is_image, value))
    if isinstance(value, Mapping):
        return bool(value.get("bytes") or value.get("path"))
    if isinstance(value, bytes):
        return True
    if not isinstance(value, str) or is_web(value):
        return False
    text = value.strip()
    if len(text) > LONGEST_PATH:
        return _BASE64.match(text) is not None
    return _IMAGE_NAME.fullmatch(text) is not None or text.startswith("file:") or _BASE64.match(text) is not None


def is_missing(value: object) -> bool:
    """True for null, NaN, and the words that programs write in their place."""
    if isinstance(value, str):
        return value.strip() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_caption(value: object) -> bool:
    """True for words, and for lists of them: no number, no URL, no name of an image."""
    if isinstance(value, (list, tuple)):
        return any(is_caption(item) for item in value)
    if isinstance(value, Mapping):  # as in the sentences of Karpathy's splits
        found = caption_field(value)
        return found is not None and is_caption(value[found])
    if not isinstance(value, str) or is_missing(value) or is_image(value) or is_web(value):
        return False
    return any(character.isalpha() for character in value) and not _is_number(value)


def image_bytes(value: Any, read: Callable[[str], bytes], column: str, caption_column: str) -> list[bytes]:
    """The encoded image of a cell, or several of a list.

    Args:
        read: gives the content of the file that a path in the cell names.
        column, caption_column: their names, for messages.

    Raises:
        RecordError: there is no image, or its file cannot be read.
    """
    if isinstance(value, (list, tuple)) and value:
        return [content for item in value for content in image_bytes(item, read, column, caption_column)]
    if isinstance(value, Mapping):  # the image column of a Hugging Face dataset
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return [value]
    if not isinstance(value, str) or is_missing(value):
        raise RecordError("the row has no image", f"column {column!r} holds neither a path nor bytes", "fill the cell")
    if is_web(value):
        remedy = DOWNLOAD.format(url=column, caption=caption_column)
        raise RecordError("the image is a URL", shorten(value), remedy)
    if _BASE64.match(value.strip()):
        return [_from_base64(value)]
    return [read(value)]


def image_path(value: str, folder: Path) -> str:
    """The path that a cell means: without `file://` and the number of a caption, and with slashes.

    Names that are not found as they are written are tried with `~` as the home folder, with `%20` as a space, and with
    the other form of accents (macOS decomposes them).
    """
    text = value.strip()
    if text.lower().startswith("file:"):
        text = unquote(urlsplit(text).path)
    found = _IMAGE_NAME.fullmatch(text)
    if found is not None and found.group(2):
        text = text[: found.start(2)]
    # Most paths hold none of these, and are not looked for here.
    if text.isascii() and not text.startswith("~") and "\\" not in text and "%" not in text:
        return text
    slashes = text.replace("\\", "/")
    spellings = [text, slashes, unquote(slashes), os.path.expanduser(slashes)]  # noqa: PTH111 (leaves unknown users)
    spellings += [unicodedata.normalize(form, name) for name in spellings[1:3] for form in ("NFC", "NFD")]
    return next((name for name in spellings if os.path.exists(folder / name)), slashes)  # noqa: PTH110 (of any name)


def captions(value: Any) -> list[str]:
    """The captions of a cell. A list holds several captions of one image, also as text: `["a cat", "a tabby"]`.

    Raises:
        RecordError: there is none, or it is no text.
    """
    if isinstance(value, str):
        value = _list_in_text(value)
    if value is None or is_missing(value):
        word = "null, not text" if not isinstance(value, str) else f"{value.strip()!r}" if value.strip() else ""
        raise RecordError("the caption is empty", word and f"it is {word}", "write a caption")
    if isinstance(value, (list, tuple)):
        texts = [text for item in value if not is_missing(item) for text in captions(item)]
        if not texts:
            raise RecordError("the caption is empty", "the list holds no text", "write a caption")
        return texts
    if isinstance(value, Mapping) and (found := caption_field(value)) is not None:
        return captions(value[found])
    if not isinstance(value, str):
        remedy = "write a caption in words; of a table, name its column: --caption-column COLUMN"
        raise RecordError("the caption is no text", f"it is a {_kind(value)}, not text", remedy)
    return [value.strip()]


def caption_field(fields: Mapping[str, Any]) -> str | None:
    """The field of a JSON object that holds its caption: `txt`, or another usual name. None: there is none."""
    usual = [name for name in ("txt", *CAPTION_FIELDS) if name in fields]
    return next((name for name in usual if not is_missing(fields[name])), next(iter(usual), None))


def shorten(value: object) -> str:
    """A value for a message, cut after a line's worth."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def _list_in_text(value: str) -> str | Sequence[Any]:
    """A list that was written as text, by JSON or by Python; other texts as they are."""
    text = value.strip()
    if not (text.startswith(("['", '["')) and text.endswith(("']", '"]'))):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(item, str) for item in found):
            return found
    return value


def _from_base64(value: str) -> bytes:
    text = value.strip()
    text = text.partition(",")[2] if text.startswith("data:") else text
    text = "".join(text.split())
    try:
        return base64.b64decode(
            text + "=" * (-len(text) % 4), altchars=b"-_" if "-" in text or "_" in text else None, validate=True
        )
    except (ValueError, binascii.Error) as error:
        raise RecordError(
            "the base64 of the image is damaged", f"{shorten(value)}: {error}", "encode it again"
        ) from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(value: object) -> str:
    """The kind of a JSON value, in JSON's words."""
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, (int, float)):
        return "number"
    return "object" if isinstance(value, Mapping) else type(value).__name__
