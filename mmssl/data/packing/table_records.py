"""Tables of images and captions: what CSV, JSON, Parquet and Arrow tables have in common, and several as one."""

import hashlib
import itertools
import os
from abc import abstractmethod
from bisect import bisect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from mmssl.data.packing import values
from mmssl.data.packing.columns import Columns, Sample, Wanted, find_column
from mmssl.data.packing.places import Places
from mmssl.data.packing.records import (
    Defects,
    Fields,
    Images,
    RecordError,
    Records,
    captions_as_fields,
    plain_value,
    record_key,
)

Progress = Callable[[int], None]
"""Called with the number of rows read so far."""

SAMPLE = 200
"""First rows whose values tell what the columns hold."""


@dataclass(frozen=True)
class TableOptions:
    """How to read a table. None: recognised from its content."""

    image_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = None
    separator: str | None = None
    encoding: str | None = None

    def wanted(self) -> Wanted:
        """The columns that are named."""
        return Wanted(self.image_column, self.caption_column, self.key_column)


class TableRecords(Records):
    """Rows with an image column, a caption column, and others."""

    def __init__(self, source: Path, names: Sequence[str], columns: Columns, sample: Sample) -> None:
        """
        Args:
            sample: column -> its values in the first rows.
        """
        self.source = source
        self.columns = columns
        self._names = list(names)
        folder = source if source.is_dir() else source.parent
        self.places = Places(folder, sample, columns.image)

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def row(self, number: int) -> Mapping[str, Any]:
        """One row by column name."""

    @abstractmethod
    def column(self, name: str) -> Iterator[Any]:
        """The values of one column."""

    @abstractmethod
    def form(self) -> str:
        """The form in which the table was read, for example "tab-separated, windows-1252"."""

    def describe(self) -> str:
        columns = self.columns
        key = "" if columns.key is None else f", key column {columns.key!r}"
        return (
            f"{self.source}: read as {self.form()}, {_named('image', columns.image, columns.more_images)}, "
            f"{_named('caption', columns.caption, columns.more_captions)}{key}{self.places.describe()}, "
            f"{len(self):,} rows"
        )

    def keys(self) -> list[str]:
        if self.columns.key is None:
            return [f"{number:09}" for number in range(len(self))]
        return distinct_keys(self.column(self.columns.key))

    def owners(self) -> list[str]:
        return first_keys(self.keys(), self.image_identities())

    def image_identities(self) -> Iterator[str | bytes | None]:
        """For each row, a value that is equal for the same image: its path, or a hash of its bytes.

        None: there is no image.
        """
        for value, inner in self._placed(self.columns.image):
            yield _image_identity(value, partial(self.places.path, inner=inner))

    def image_files(self, known: Container[str]) -> Iterator[str]:
        """The file of each image that a row names.

        Args:
            known: files that exist, so that they need not be looked for.
        """
        for name in (self.columns.image, *self.columns.more_images):
            for value, inner in self._placed(name):
                for cell in _paths_in(value):
                    path = os.path.abspath(self.places.path(cell, inner))  # noqa: PTH100 - links stay
                    if path not in known:
                        with suppress(RecordError):  # several files may be meant; `load` says so
                            path = os.path.abspath(self.places.find(cell, inner))  # noqa: PTH100
                    yield path

    def _placed(self, name: str) -> Iterator[tuple[Any, Any]]:
        """The values of a column, each with the folder that another column names for it."""
        inner = itertools.repeat(None) if self.places.column is None else self.column(self.places.column)
        return zip(self.column(name), inner, strict=False)

    def values(self, field: str) -> list[Any]:
        name = find_column(self.source, self._names, field)
        return [plain_value(value) for value in self.column(name)]

    def images(self, row: Mapping[str, Any], name: str) -> list[bytes]:
        """The encoded images of a cell. Raises RecordError if there is none, or its file cannot be read."""
        inner = row.get(self.places.column) if self.places.column is not None else None
        read = partial(self.places.read, inner=inner)
        return values.image_bytes(row.get(name), read, name, self.columns.caption)

    def load(self, number: int) -> tuple[Images, Fields]:
        row, columns = self.row(number), self.columns
        images = _filled(row, columns.image, columns.more_images)
        contents = [content for name in images for content in self.images(row, name)]
        captions = _filled(row, columns.caption, columns.more_captions)
        texts = [text for name in captions for text in values.captions(row.get(name))]
        # The path is kept as a field, so that the file of a sample can be found.
        cells = {name: row.get(name) for name in images}
        no_paths = {n for n, cell in cells.items() if not (isinstance(cell, str) and len(cell) <= values.LONGEST_PATH)}
        left_out = {columns.caption, *columns.more_captions, *no_paths}
        fields = {name: plain_value(value) for name, value in row.items() if name not in left_out}
        return tuple(contents), fields | captions_as_fields(texts, columns.caption)


def _filled(row: Mapping[str, Any], first: str, more: Sequence[str]) -> list[str]:
    """The columns that hold something in a row; the first if none does."""
    return [name for name in (first, *more) if not values.is_missing(row.get(name))] or [first]


class JoinedRecords(Records):
    """Several tables as one."""

    def __init__(self, parts: Sequence[TableRecords]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))
        self.ordered = any(part.ordered for part in parts)

    def describe(self) -> str:
        return f"{len(self._parts)} tables, {self._ends[-1]:,} rows; the first is {self._parts[0].describe()}"

    def keys(self) -> list[str]:
        if all(part.columns.key is None for part in self._parts):
            return [f"{number:09}" for number in range(self._ends[-1])]
        return distinct_keys(chain.from_iterable(part.keys() for part in self._parts))

    def owners(self) -> list[str]:
        return first_keys(self.keys(), self.image_identities())

    def image_identities(self) -> Iterator[str | bytes | None]:
        """As `TableRecords.image_identities`, of all tables."""
        return chain.from_iterable(part.image_identities() for part in self._parts)

    def image_files(self, known: Container[str]) -> Iterator[str]:
        """As `TableRecords.image_files`, of all tables."""
        return chain.from_iterable(part.image_files(known) for part in self._parts)

    def defects(self) -> Defects:
        found = [(f"{part.source}: {place}", error) for part in self._parts for place, error in part.defects()]
        return [*found, *self.beside]

    def identity(self) -> str:
        return hashlib.blake2b("".join(part.identity() for part in self._parts).encode(), digest_size=16).hexdigest()

    def values(self, field: str) -> list[Any]:
        return [value for part in self._parts for value in part.values(field)]

    def load(self, number: int) -> tuple[Images, Fields]:
        part = bisect(self._ends, number)
        return self._parts[part].load(number - (self._ends[part - 1] if part else 0))


def distinct_keys(cells: Iterable[Any]) -> list[str]:
    """Keys of rows by the values of a column.

    A repeated `a` becomes `a-2`. Without a value, the row number is the key.
    """
    found = [f"{n:09}" if values.is_missing(cell) else record_key(str(cell)) for n, cell in enumerate(cells)]
    taken, counts = set(found), dict.fromkeys(found, 0)
    for number, key in enumerate(found):
        counts[key] += 1
        if counts[key] > 1:
            while (unique := f"{key}-{counts[key]}") in taken:
                counts[key] += 1
            taken.add(unique)
            found[number] = unique
    return found


def first_keys(keys: Sequence[str], identities: Iterable[str | bytes | None]) -> list[str]:
    """For each row the key of the first row with the same identity; its own without an identity."""
    first: dict[str | bytes, str] = {}
    return [key if it is None else first.setdefault(it, key) for key, it in zip(keys, identities, strict=True)]


def _named(what: str, first: str, more: Sequence[str]) -> str:
    return f"{what} column{'s' if more else ''} {', '.join(map(repr, (first, *more)))}"


def _paths_in(value: Any) -> Iterator[str]:
    """The paths in a cell: one, several in a list, or none."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        path = item.get("path") if isinstance(item, Mapping) and not item.get("bytes") else item
        if isinstance(path, str) and not values.is_missing(path) and len(path) <= values.LONGEST_PATH:
            yield path


def _image_identity(value: Any, path: Callable[[str], Path]) -> str | bytes | None:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and not values.is_missing(value):
        if len(value) <= values.LONGEST_PATH:
            return os.path.normpath(path(value))
        value = "".join(value.split()).encode()
    return hashlib.blake2b(value, digest_size=16).digest() if isinstance(value, bytes) and value else None
