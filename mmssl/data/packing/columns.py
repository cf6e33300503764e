"""Columns of a table: the image, the caption and the key, found by their names and by what they hold."""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmssl.data.packing import values
from mmssl.data.packing.records import plain_value
from mmssl.errors import UserError
from mmssl.types import CAPTION_FIELDS

IMAGE_COLUMNS = (
    "image",
    "img",
    "jpg",
    "png",
    "webp",
    "image_path",
    "img_path",
    "filepath",
    "file_path",
    "file_name",
    "filename",
    "image_name",
    "image_file",
    "path",
    "images",
)
"""Names of the image column, in order of preference. Case, spaces and underscores do not count."""
URL_COLUMNS = ("url", "image_url", "img_url", "link", "image_link")
"""Names of columns of URLs."""
KEY_COLUMNS = ("__key__", "key", "id")
"""Names of the key column, in order of preference. Without one, the row number is the key."""
_SHOWN = 20
"""Names of columns in a message."""
_AGAIN = re.compile(r" \(\d+\)$")
"""The mark of a column whose name occurred before."""


class MissingColumnError(UserError):
    """A table has no column of some role."""

    def __init__(self, message: str, names: Sequence[str], role: str) -> None:
        """Args:
        names: all columns.
        role: `image`, `caption` or `key`.
        """
        super().__init__(message)
        self.names = names
        self.role = role


Sample = Mapping[str, Sequence[Any]]
"""Column -> its values in some rows."""


@dataclass(frozen=True)
class Wanted:
    """Names of columns that the user gave, of several with commas in between. None: found by name."""

    image: str | None = None
    caption: str | None = None
    key: str | None = None

    def named(self) -> set[str]:
        """All names that are given."""
        return {name for name in (self.image, self.caption, self.key) if name is not None}


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table."""

    image: str
    caption: str
    key: str | None
    """None: the row number is the key."""
    more_images: tuple[str, ...] = ()
    """Columns of further images of a row."""
    more_captions: tuple[str, ...] = ()
    """Columns of further captions of a row."""


def plain(name: str) -> str:
    """A name for comparison: without case, spaces, underscores and the mark of a repetition."""
    return re.sub(r"[\W_]+", "", _AGAIN.sub("", name)).lower()


def distinct(names: Sequence[str]) -> list[str]:
    """Names of columns made distinct: `image`, `image (2)`; a column without name is `column 1`."""
    found: list[str] = []
    for place, name in enumerate(names, start=1):
        base = name.strip() or f"column {place}"
        count = 1
        while (unique := base if count == 1 else f"{base} ({count})") in found:
            count += 1
        found.append(unique)
    return found


def roles(names: Sequence[str], wanted: Wanted) -> int:
    """How many of image and caption the names tell: 0, 1 or 2."""
    known = {plain(name) for name in names}
    groups = ((wanted.image, (*IMAGE_COLUMNS, *URL_COLUMNS)), (wanted.caption, CAPTION_FIELDS))
    return sum(
        any(plain(name) in known for name in ((given, *given.split(",")) if given else usual))
        for given, usual in groups
    )


def find_columns(source: Path, names: Sequence[str], sample: Sample, wanted: Wanted, header: bool) -> Columns:
    """The columns of a table.

    Args:
        sample: values of the first rows.
        header: False if the columns are numbered, so that only their content tells what they are.

    Raises:
        UserError: a column is missing, or holds something else.
    """
    image, *images = (
        [_image_column(source, names, sample, header)]
        if wanted.image is None
        else _all_named(source, names, wanted.image, "image")
    )
    caption, *captions = (
        [_caption_column(source, names, sample, header, image)]
        if wanted.caption is None
        else _all_named(source, names, wanted.caption, "caption")
    )
    usual = next(iter(_usual(names, KEY_COLUMNS)), None)
    key = usual if wanted.key is None else _named(source, names, wanted.key, "key")
    return Columns(image, caption, key, tuple(images), tuple(captions))


def find_column(source: Path | str, names: Sequence[str], given: str, what: str = "column") -> str:
    """A column or field that the user names, in any case.

    Raises:
        UserError: there is none, or several.
    """
    alike = [given] if given in names else [name for name in names if plain(name) == plain(given)]
    if len(alike) != 1:
        known = f"its {what}s are {listed(names)}" if names else f"it has no {what}s"
        raise UserError(f"{source} has no {what} {given!r}; {known}")
    return alike[0]


def field_values(source: str, field: str, found: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The value of a field in each record; None where it is missing.

    Args:
        source: its name, for messages.
        field: name of the field, in any case.
        found: the fields of each record.

    Raises:
        UserError: no record has the field: names those that there are.
    """
    names: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for fields in found:
        names.update(dict.fromkeys(fields))
        rows.append({name: value for name, value in fields.items() if plain(name) == plain(field)})
    name = find_column(source, list(names), field, "field")
    return [plain_value(row.get(name)) for row in rows]


def _image_column(source: Path, names: Sequence[str], sample: Sample, header: bool) -> str:
    usual = _usual(names, (*IMAGE_COLUMNS, *URL_COLUMNS)) if header else list(names)
    with_images = [name for name in usual if _mostly(sample[name], values.is_image)]
    if with_images and (header or len(with_images) == 1):
        return with_images[0]
    urls = [name for name in usual if _mostly(sample[name], values.is_web)]
    if urls:
        caption = next(iter(_usual(names, CAPTION_FIELDS)), "COLUMN")
        raise UserError(
            f"column {urls[0]!r} of {source} holds URLs, such as {values.shorten(_first(sample[urls[0]]))}; "
            + values.DOWNLOAD.format(url=urls[0], caption=caption).replace("TABLE", str(source))
        )
    if not header:
        raise _unnumbered(source, names, "image", with_images)
    named = _usual(names, IMAGE_COLUMNS)
    if not named:
        alike = [name for name in names if _mostly(sample[name], values.is_image)]
        raise _missing(source, names, "image", f"none of {', '.join(IMAGE_COLUMNS)}", alike)
    return named[0]


def _caption_column(source: Path, names: Sequence[str], sample: Sample, header: bool, image: str) -> str:
    usual = _usual(names, CAPTION_FIELDS) if header else [name for name in names if name != image]
    with_words = [name for name in usual if _mostly(sample[name], values.is_caption)]
    if with_words and (header or len(with_words) == 1):
        return with_words[0]
    if not header:
        raise _unnumbered(source, names, "caption", with_words)
    if not usual:
        alike = [name for name in names if name != image and _mostly(sample[name], values.is_caption)]
        alike.sort(key=lambda name: -sum(len(str(cell)) for cell in sample[name]))
        raise _missing(source, names, "caption", f"none of {', '.join(CAPTION_FIELDS)}", alike)
    filled = next((name for name in usual if not all(map(values.is_missing, sample[name]))), None)
    if filled is not None and not any(map(values.is_caption, sample[filled])):
        example = values.shorten(_first(sample[filled]))
        raise UserError(
            f"column {filled!r} of {source} holds no captions, but for example {example}; "
            f"name the caption column: --caption-column NAME; its columns are {listed(names)}"
        )
    return filled or usual[0]


def _usual(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """The columns with one of the usual names, in order of preference."""
    return [name for known in usual for name in names if plain(name) == plain(known)]


def _named(source: Path, names: Sequence[str], given: str, what: str) -> str:
    try:
        return find_column(source, names, given)
    except UserError:
        raise _missing(source, names, what, repr(given)) from None


def _all_named(source: Path, names: Sequence[str], given: str, what: str) -> list[str]:
    """One column, or several with commas in between."""
    known = {plain(name) for name in names}
    parts = [given] if plain(given) in known or "," not in given else [part.strip() for part in given.split(",")]
    return list(dict.fromkeys(_named(source, names, part, what) for part in parts))


def _mostly(cells: Sequence[Any], test: Callable[[object], bool]) -> bool:
    """True if more than half of the cells that hold something pass the test."""
    filled = [cell for cell in cells if not values.is_missing(cell)]
    return 2 * sum(map(test, filled)) > len(filled)


def _first(cells: Sequence[Any]) -> Any:
    return next((cell for cell in cells if not values.is_missing(cell)), None)


def _missing(
    source: Path, names: Sequence[str], what: str, tried: str, alike: Sequence[str] = ()
) -> MissingColumnError:
    """The error of a column that is not found by name, with those that hold what it should."""
    message = (
        f"{source} has no {what} column ({tried}); its columns are {listed(names)}; name one: "
        f"--{what}-column {shlex.quote(alike[0]) if alike else 'NAME'}"
    )
    return MissingColumnError(message, names, what)


def listed(names: Sequence[str]) -> str:
    """Names for a message: the first twenty."""
    more = f" ... ({len(names):,})" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _unnumbered(source: Path, names: Sequence[str], what: str, found: Sequence[str]) -> UserError:
    which = f"columns {' and '.join(found)} could be it" if found else f"none of its {len(names)} columns looks like it"
    return UserError(
        f"{source} has no line with the names of its columns, and {which}; give the number of the {what} column: "
        f"--{what}-column 2"
    )
