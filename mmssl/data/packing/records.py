"""Sources of images and captions that can be packed: their interface, and what they share."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmssl.data.packing.encodings import MARKS
from mmssl.errors import UserError
from mmssl.files import open_regular
from mmssl.types import CAPTION_FIELDS

Fields = dict[str, Any]
Images = tuple[bytes, ...]
"""The encoded images of a record, at least one."""

MANIFEST = "mmssl-pack.json"
"""File of a packed folder that identifies the records and options."""

UNREADABLE = "a file cannot be read"
"""Cause of records whose file may be restored."""


_NOT_IN_KEYS = re.compile(r"[.\0\r\n]")
_HEAD = 128
"""Bytes of a file that tell its kind."""


class RecordError(ValueError):
    """One unusable record. The message is the cause, with the particulars behind a colon."""

    def __init__(self, cause: str, detail: str = "", remedy: str = "") -> None:
        """
        Args:
            cause: the same text for all records of its kind.
            detail: the particulars of this record: a file, a line, a library's message.
            remedy: an instruction that makes such records usable.
        """
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.remedy = remedy


Defects = list[tuple[str, RecordError]]
"""Place and error of records that cannot be read at all."""


class Records(ABC):
    """Images with captions, readable one by one from several threads."""

    ordered: bool = False
    """True if reading out of order is slow."""
    beside: Sequence[tuple[str, RecordError]] = ()
    """What lies beside the records and seems to offer pairs, as in `defects`, which includes it. Set from outside."""

    @abstractmethod
    def keys(self) -> list[str]:
        """Key of each record, without dots. Unique unless the source repeats a key."""

    def describe(self) -> str:
        """One line: what was recognised in the source. Empty: nothing had to be."""
        return ""

    def defects(self) -> Defects:
        """Place and error of each record that is no record at all: it has no key and cannot be loaded."""
        return list(self.beside)

    def values(self, field: str) -> list[Any]:
        """The value of a field in each record.

        Raises:
            UserError: no record has the field.
        """
        raise UserError(f"these records have no field {field!r}; give a table, a folder or shards with fields")

    def owners(self) -> list[str]:
        """For each record, the key of the first record with the same image: they belong to one split."""
        return self.keys()

    def identity(self) -> str:
        """A cheap fingerprint of the source's content."""
        return ""

    @abstractmethod
    def load(self, number: int) -> tuple[Images, Fields]:
        """Read the encoded images and the fields, including `txt`.

        Raises:
            RecordError: the record is missing or invalid.
        """


def record_key(name: str) -> str:
    """Turn a name into a WebDataset key: no dots, which would end the key, and no invalid characters."""
    return _NOT_IN_KEYS.sub("_", name.encode("utf-8", "replace").decode().strip("/")) or "_"


def read_file(path: Path) -> bytes:
    """Read a file. Raises RecordError if it cannot be read, as a device or a pipe."""
    try:
        with open_regular(path) as file:
            return file.readall()
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecordError(UNREADABLE, f"{str(path)!r}: {reason}", "correct its path, or restore it") from None


def read_head(path: Path) -> bytes:
    """The first bytes of a file, which tell its kind. Raises UserError if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(_HEAD) or b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def as_text(content: bytes, name: str) -> str:
    """Decode the text of a file: UTF-8, or what its byte order mark says. Raises RecordError if it is neither."""
    mark = next((encoding for mark, encoding in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(mark).strip()
    except UnicodeDecodeError as error:
        raise RecordError("the text is not UTF-8", f"byte {error.start} of {name}", "save it as UTF-8") from None


def captions_as_fields(texts: Sequence[str], field: str) -> Fields:
    """The fields of one or several captions: `txt` is the first, and a list under a name of captions has them all.

    A text of several lines gets the list too: without it, each line would be a caption.
    """
    if len(texts) == 1 and len(texts[0].splitlines()) < 2:
        return {"txt": texts[0]}
    names = {field} if field in CAPTION_FIELDS else {field, "captions"}
    # `txt` itself is one text.
    return {name if name != "txt" else "captions": list(texts) for name in names} | {"txt": texts[0]}


def plain_value(value: Any) -> Any:
    """Convert a value to plain JSON types; bytes are dropped."""
    if isinstance(value, Mapping):
        return {str(name): plain_value(item) for name, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
