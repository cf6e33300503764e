"""Labelled images: a folder of images per class, or a table with a column of labels."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmssl.data.packing import values
from mmssl.data.packing.columns import MissingColumnError, plain
from mmssl.data.packing.folders import holds_pairs
from mmssl.data.packing.records import Fields, Images, RecordError, Records, plain_value, read_file, record_key
from mmssl.data.packing.table_records import TableRecords
from mmssl.data.packing.tables import open_records
from mmssl.data.shards import IMAGES
from mmssl.data.shards.urls import table_suffix
from mmssl.errors import UserError

LABEL = "label"
"""Field of the packed samples that holds the class."""
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target", "breed", "species")
"""Names of the label column, in order of preference. Case, spaces and underscores do not count."""
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation", "dev"),
}
"""Split -> names of its folder, in order of preference."""
Splits = dict[str, Records]
"""`train` and `test`, or `all` where the data has no splits -> its records."""


class ClassFolders(Records):
    """A folder with a folder of images for each class, as torchvision's ImageFolder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._images = [path for name in class_folders(folder) for path in sorted((folder / name).rglob("*"))]
        self._images = [path.relative_to(folder) for path in self._images if _is_image(path)]

    def keys(self) -> list[str]:
        return _distinct([record_key(str(path)) for path in self._images])

    def identity(self) -> str:
        stamps = [((self._folder / path).stat(), path) for path in self._images]
        return repr([(str(path), status.st_size, status.st_mtime_ns) for status, path in stamps])

    def load(self, number: int) -> tuple[Images, Fields]:
        path = self._images[number]
        name = _words(path.parts[0])
        return (read_file(self._folder / path),), {LABEL: name, "txt": name}


class LabelledRows(Records):
    """The rows of a table, with their labels as captions."""

    def __init__(self, table: TableRecords, column: str) -> None:
        self._table = table
        self._column = column
        self.ordered = table.ordered

    def describe(self) -> str:
        return f"{self._table.source}: image column {self._table.columns.image!r}, label column {self._column!r}"

    def keys(self) -> list[str]:
        return self._table.keys()

    def identity(self) -> str:
        digest = hashlib.blake2b(f"{self._column} {self._table.identity()}".encode(), digest_size=16)
        for image in self._table.image_identities():
            try:
                status = os.stat(image) if isinstance(image, str) else None  # noqa: PTH116
                digest.update(repr(image if status is None else (image, status.st_size, status.st_mtime_ns)).encode())
            except (OSError, ValueError):
                digest.update(repr(image).encode())
        return digest.hexdigest()

    def load(self, number: int) -> tuple[Images, Fields]:
        row, columns = self._table.row(number), self._table.columns
        images = self._table.images(row, columns.image)
        label = row.get(self._column)
        if values.is_missing(label):
            raise RecordError("the row has no label", f"column {self._column!r} is empty", "fill the cell")
        fields = {name: plain_value(value) for name, value in row.items() if name != columns.image}
        return tuple(images), {**fields, self._column: label, LABEL: _number_or_text(label), "txt": str(label)}


def open_labelled(source: Path, label: str | None = None) -> Splits | None:
    """Labelled images that are no shards: a folder per class, splits of such folders, or tables.

    Args:
        source: a folder, or a table. A folder may hold tables named after splits: train.csv, test.csv.
        label: column of the labels. Default: found by its name.

    Returns:
        None if the source is neither.

    Raises:
        UserError: a table has no column of labels or of images.
    """
    # os.path, unlike pathlib, accepts names that are too long, such as patterns with many braces.
    if os.path.isfile(source):  # noqa: PTH113
        return None if table_suffix(source.name) is None else {"all": _rows(source, label)}
    if not os.path.isdir(source) or any(  # noqa: PTH112
        source.rglob("*.tar")
    ):
        return None
    tables = {split: _table_of(source, names) for split, names in SPLITS.items()}
    if tables["train"] is not None and tables["test"] is not None:
        return {split: _rows(table, label) for split, table in tables.items() if table is not None}
    places = {split: _folder_of(source, names) for split, names in SPLITS.items()}
    found = {split: place for split, place in places.items() if place is not None and len(class_folders(place)) > 1}
    if len(found) == 1:  # a split alone is all there is
        return {"all": ClassFolders(next(iter(found.values())))}
    if found:
        return {split: ClassFolders(place) for split, place in found.items()}
    return {"all": ClassFolders(source)} if len(class_folders(source)) > 1 else None


def class_folders(folder: Path) -> list[str]:
    """Names of the folders that hold images, sorted: the classes. Empty if captions lie beside the images."""
    places = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
    found = [path for path in places if any(map(_is_image, path.rglob("*")))]
    return [] if any(map(holds_pairs, found)) else [path.name for path in found]


def _rows(source: Path, label: str | None) -> LabelledRows:
    wanted = [label] if label else list(LABEL_COLUMNS)
    try:
        table = open_records(source, caption_column=wanted[0])
    except MissingColumnError as error:
        if error.role != "caption":
            raise
        alike = [name for usual in wanted for name in error.names if plain(name) == plain(usual)]
        if not alike:
            tried = repr(label) if label else f"none of {', '.join(LABEL_COLUMNS)}"
            raise UserError(
                f"{source} has no label column ({tried}); its columns are {', '.join(error.names)}; name one: "
                "--label COLUMN; to evaluate captions instead, pack it: "
                f"mmssl shards pack {source} --out FOLDER --caption-column COLUMN"
            ) from None
        table = open_records(source, caption_column=alike[0])
    assert isinstance(table, TableRecords)
    return LabelledRows(table, table.columns.caption)


def _table_of(folder: Path, names: Sequence[str]) -> Path | None:
    tables = {path.name.partition(".")[0].lower(): path for path in sorted(folder.iterdir()) if table_suffix(path.name)}
    return next((tables[name] for name in names if name in tables), None)


def _folder_of(folder: Path, names: Sequence[str]) -> Path | None:
    places = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return next((places[name] for name in names if name in places), None)


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and path.suffix.lower().lstrip(".") in IMAGES and path.is_file()


def _words(name: str) -> str:
    """The name of a folder as a text tower should read it."""
    return re.sub(r"[_\s]+", " ", name).strip()


def _number_or_text(label: Any) -> int | str:
    """A class number as int, as in .cls members; other labels as text."""
    text = str(label).strip()
    return int(text) if text.removeprefix("-").isdecimal() and len(text) < 19 else text


def _distinct(keys: Sequence[str]) -> list[str]:
    """Keys made unique: `a/b.png` and `a/b.jpg` are two images."""
    seen: dict[str, int] = {}
    found = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        found.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return found
