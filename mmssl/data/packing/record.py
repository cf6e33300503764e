"""Images with captions that are in no shards yet."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Fields = dict[str, Any]

CAPTION_COLUMNS = ("caption", "text", "txt", "captions", "description", "title", "sentence")
"""Names under which a caption is looked for in a table or a JSON file."""


class RecordError(ValueError):
    """One record that cannot be used."""


class Records(ABC):
    """Images with captions, to be read one by one from several threads."""

    ordered: bool = False
    """Whether reading out of order is slow."""

    @abstractmethod
    def keys(self) -> list[str]:
        """The name of each record: no dots, unique unless the source repeats itself."""

    def owners(self) -> list[str]:
        """For each record the key of the first with the same image: those of one image belong to one split."""
        return self.keys()

    def identity(self) -> str:
        """What tells this source from others whose records have the same names, as far as that is quickly read."""
        return ""

    @abstractmethod
    def load(self, number: int) -> tuple[bytes, Fields]:
        """The encoded image and the fields, `txt` among them.

        Raises:
            RecordError: it is missing or makes no sense.
        """


def record_key(name: str) -> str:
    """A name without dots, which would end a WebDataset key, and without what file names cannot hold."""
    return name.encode("utf-8", "replace").decode().strip("/").replace(".", "_").replace("\0", "_") or "_"


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises RecordError where it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecordError(f"{str(path)!r} cannot be read: {reason}") from None


def as_text(content: bytes, name: str) -> str:
    """The text of a file. Raises RecordError where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RecordError(f"{name} is not UTF-8 (byte {error.start})") from None


def find_caption(value: Any) -> str:
    """A caption, or the first of several. Raises RecordError where there is none."""
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if not isinstance(value, str):
        raise RecordError(f"the caption is {type(value).__name__}, not text")
    return value


def plain_value(value: Any) -> Any:
    """The value as JSON can hold it; bytes are left out."""
    if isinstance(value, Mapping):
        return {str(name): plain_value(item) for name, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
