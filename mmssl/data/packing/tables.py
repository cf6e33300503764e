"""Tables of images and captions: CSV, TSV, JSONL, Parquet, and Hugging Face datasets on disk."""

import csv
import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock, local
from typing import Any
from weakref import WeakValueDictionary

from mmssl.data.packing.folders import FolderRecords, holds_pairs
from mmssl.data.packing.records import (
    CAPTION_COLUMNS,
    Fields,
    RecordError,
    Records,
    find_caption,
    plain_value,
    read_file,
    record_key,
)
from mmssl.data.packing.shard_records import ShardRecords
from mmssl.data.shards import TABLES
from mmssl.data.shards.urls import ARCHIVES
from mmssl.errors import UserError

IMAGE_COLUMNS = (
    "image",
    "img",
    "jpg",
    "png",
    "webp",
    "image_path",
    "filepath",
    "file_path",
    "file_name",
    "filename",
    "path",
)
"""Names of the image column, in order of preference."""
KEY_COLUMNS = ("__key__", "key", "id")
"""Names of the key column, in order of preference. Without one, the row number is the key."""
_FOOTER_BYTES = 1 << 20
"""Bytes at the end of a Parquet file that contain its metadata."""

Columns = tuple[str | None, str | None, str | None]
"""Names of the image, caption and key column. None: found by name."""


def open_records(
    source: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    key_column: str | None = None,
) -> Records:
    """Open a folder of images, a table, or a Hugging Face dataset saved with `save_to_disk`.

    Raises:
        UserError: the source or a column is missing.
    """
    columns = (image_column, caption_column, key_column)
    if source.is_dir():
        if (source / "dataset_dict.json").is_file():
            splits = json.loads((source / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
            raise UserError(f"{source} has several splits; name one: {', '.join(str(source / s) for s in splits)}")
        if (source / "state.json").is_file():
            return ArrowRecords(source, columns)
        shards = sorted(str(path) for path in source.glob("*.tar"))
        return ShardRecords(shards) if shards and not holds_pairs(source) else FolderRecords(source)
    if source.is_file() and source.name.lower().endswith(ARCHIVES):
        return ShardRecords([str(source)])
    if not source.is_file():
        raise UserError(f"{source} does not exist; give a folder of images, a {', '.join(TABLES)} file or a dataset")
    if source.suffix not in TABLES:
        raise UserError(f"{source} is not a {', '.join(TABLES)} file; give one of these, or a folder of images")
    return ParquetRecords(source, columns) if source.suffix == ".parquet" else RowRecords(source, columns)


class TableRecords(Records):
    """Rows with an image column (paths or bytes), a caption column, and others."""

    def __init__(self, source: Path, names: Sequence[str], columns: Columns) -> None:
        image, caption, key = columns
        self._source = source
        self._image = _column(source, names, image, IMAGE_COLUMNS, "image")
        self._caption = _column(source, names, caption, CAPTION_COLUMNS, "caption")
        self._key = _column(source, names, key, KEY_COLUMNS, "key") if key else _first(names, KEY_COLUMNS)

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def row(self, number: int) -> Mapping[str, Any]:
        """One row by column name."""

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """One column."""

    def keys(self) -> list[str]:
        if self._key is None:
            return [f"{number:09}" for number in range(len(self))]
        return [record_key(str(value)) for value in self.column(self._key)]

    def owners(self) -> list[str]:
        if not self.has_paths():
            return self.keys()
        first: dict[Any, str] = {}
        return [first.setdefault(p, k) for p, k in zip(self.column(self._image), self.keys(), strict=True)]

    def has_paths(self) -> bool:
        """True if the image column holds only paths, which can be compared without reading images."""
        return False

    def load(self, number: int) -> tuple[bytes, Fields]:
        row = self.row(number)
        image = row.get(self._image)
        # The path is kept as a field, so that the file of a sample can be found.
        left_out = {self._caption} if isinstance(image, str) else {self._caption, self._image}
        fields = {name: plain_value(value) for name, value in row.items() if name not in left_out}
        caption = row.get(self._caption)
        if isinstance(caption, (list, tuple)):
            fields[self._caption] = plain_value(caption)
        return self._read_image(image), fields | {"txt": find_caption(caption)}

    def _read_image(self, value: Any) -> bytes:
        if isinstance(value, Mapping):  # the image column of a Hugging Face dataset
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise RecordError(f"column {self._image!r} holds neither a path nor bytes")
        folder = self._source if self._source.is_dir() else self._source.parent
        return read_file(folder / value)


class RowRecords(TableRecords):
    """A CSV, TSV or JSONL file, held in memory."""

    def __init__(self, source: Path, columns: Columns) -> None:
        try:
            with source.open(encoding="utf-8-sig", newline="") as file:
                if source.suffix in (".csv", ".tsv"):
                    self._rows = list(
                        csv.DictReader(file, delimiter="\t" if source.suffix == ".tsv" else ",", strict=True)
                    )
                else:
                    self._rows = [json.loads(line) for line in file if line.strip()]
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise UserError(f"{source} cannot be read: {' '.join(str(error).split())}") from None
        if not self._rows or not all(isinstance(row, dict) for row in self._rows):
            raise UserError(f"{source} has no rows with named columns")
        super().__init__(source, list(self._rows[0]), columns)
        self._identity = _digest(source.read_bytes())

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Mapping[str, Any]:
        # DictReader stores surplus values under None.
        return {name: value for name, value in self._rows[number].items() if isinstance(name, str)}

    def identity(self) -> str:
        return self._identity

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self._rows]

    def has_paths(self) -> bool:
        return all(isinstance(value, str) for value in self.column(self._image))


class ArrowRecords(TableRecords):
    """A folder written by Hugging Face's `save_to_disk`: memory-mapped Arrow streams."""

    def __init__(self, source: Path, columns: Columns) -> None:
        arrow = _pyarrow()
        try:
            self._state = (source / "state.json").read_bytes()
            names = [file["filename"] for file in json.loads(self._state)["_data_files"]]
            streams = [arrow.ipc.open_stream(arrow.memory_map(str(source / name))) for name in names]
            self._table = arrow.concat_tables([stream.read_all() for stream in streams])
        except (OSError, ValueError, TypeError, KeyError, arrow.ArrowException) as error:
            raise UserError(f"{source} is not a complete dataset of save_to_disk ({error!r}); save it again") from None
        super().__init__(source, self._table.column_names, columns)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, number: int) -> Mapping[str, Any]:
        row: dict[str, Any] = self._table.slice(number, 1).to_pylist()[0]
        return row

    def identity(self) -> str:
        return _digest(self._state)  # contains the fingerprint of the datasets library

    def column(self, name: str) -> list[Any]:
        return list(self._table.column(name).to_pylist())


class ParquetRecords(TableRecords):
    """A Parquet file, read one row group at a time."""

    ordered = True

    def __init__(self, source: Path, columns: Columns) -> None:
        arrow = _pyarrow()
        try:
            self._file = arrow.parquet.ParquetFile(source, memory_map=True)
        except (OSError, arrow.ArrowException) as error:
            raise UserError(f"{source} cannot be read: {' '.join(str(error).split())}") from None
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        self._groups = _RowGroups(self._file.read_row_group)
        super().__init__(source, self._file.schema_arrow.names, columns)

    def __len__(self) -> int:
        return len(self._places)

    def row(self, number: int) -> Mapping[str, Any]:
        group, place = self._places[number]
        row: dict[str, Any] = self._groups.at(group).slice(place, 1).to_pylist()[0]
        return row

    def identity(self) -> str:
        with self._source.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _FOOTER_BYTES))
            return _digest(file.read() + size.to_bytes(8, "little"))

    def column(self, name: str) -> list[Any]:
        return list(self._file.read(columns=[name]).column(name).to_pylist())

    def has_paths(self) -> bool:
        return str(self._file.schema_arrow.field(self._image).type) in ("string", "large_string")


class _RowGroups:
    """Cache of the row groups that threads are reading, each held once."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        self._read = read
        self._lock = Lock()
        self._mine = local()
        self._held: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def at(self, number: int) -> Any:
        """A row group, held until the calling thread reads another one."""
        if getattr(self._mine, "number", None) != number:
            with self._lock:
                found = self._held.get(number)
                if found is None:
                    found = self._held[number] = self._read(number)
                self._mine.number, self._mine.table = number, found
        return self._mine.table


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "reading Parquet and Hugging Face datasets needs pyarrow: pip install 'mmssl[parquet]'"
        ) from None
    return pyarrow


def _column(source: Path, names: Sequence[str], wanted: str | None, usual: Sequence[str], what: str) -> str:
    found = wanted if wanted is not None else _first(names, usual)
    if found is None or found not in names:
        tried = repr(wanted) if wanted is not None else f"none of {', '.join(usual)}"
        raise UserError(f"{source} has no {what} column ({tried}); its columns are {', '.join(map(str, names))}")
    return found


def _first(names: Sequence[str], usual: Sequence[str]) -> str | None:
    return next((name for name in usual if name in names), None)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
