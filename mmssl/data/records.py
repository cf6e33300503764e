"""What can be packed into shards: a folder of pictures, a table of paths and captions, a Hugging Face data set."""

import csv
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmssl.data.grouping import IMAGES
from mmssl.types import UserError

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
"""Names under which the picture's column is looked for, in this order."""
CAPTION_COLUMNS = ("caption", "text", "txt", "captions", "description", "title", "sentence")
"""Names under which the caption's column is looked for."""
KEY_COLUMNS = ("__key__", "key", "id")
"""Names under which the key's column is looked for; without one the row's number is the key."""
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

Fields = dict[str, Any]


class RecordError(ValueError):
    """One record that cannot be used."""


class Records(ABC):
    """Pictures with captions, to be read one by one from several threads."""

    ordered: bool = False
    """Whether reading out of order is slow."""

    @abstractmethod
    def keys(self) -> list[str]:
        """The name of each record: no dots, unique unless the source repeats itself."""

    def owners(self) -> list[str]:
        """For each record the key of the first with the same picture: those of one picture belong to one split."""
        return self.keys()

    @abstractmethod
    def load(self, number: int) -> tuple[bytes, Fields]:
        """The encoded picture and the fields, `txt` among them.

        Raises:
            RecordError: it is missing or makes no sense.
        """


def open_records(
    source: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    key_column: str | None = None,
) -> Records:
    """The records of a folder, a table or a Hugging Face data set saved with `save_to_disk`.

    Raises:
        UserError: there is no such thing, or a column cannot be found.
    """
    columns = (image_column, caption_column, key_column)
    if source.is_dir():
        if (source / "dataset_dict.json").is_file():
            splits = json.loads((source / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
            raise UserError(f"{source} holds several splits; name one: {', '.join(str(source / s) for s in splits)}")
        if (source / "state.json").is_file():
            return _ArrowRecords(source, columns)
        return _FolderRecords(source)
    if not source.is_file():
        raise UserError(f"{source} does not exist; give a folder of pictures, a {', '.join(TABLES)} file or a data set")
    if source.suffix not in TABLES:
        raise UserError(f"{source} is none of {', '.join(TABLES)}; give one of these, or a folder of pictures")
    return _ParquetRecords(source, columns) if source.suffix == ".parquet" else _RowRecords(source, columns)


Columns = tuple[str | None, str | None, str | None]
"""Names of the picture's, the caption's and the key's column; None where they are to be found out."""


class _FolderRecords(Records):
    """Pictures anywhere below a folder, each with NAME.txt or NAME.json beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = (path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGES and path.is_file())
        self._paths = sorted(files)
        if not self._paths:
            raise UserError(f"{folder} holds no picture; the extensions are {', '.join(IMAGES)}")

    def keys(self) -> list[str]:
        return [_key_of(path.relative_to(self._folder).with_suffix("").as_posix()) for path in self._paths]

    def load(self, number: int) -> tuple[bytes, Fields]:
        path = self._paths[number]
        fields: Fields = {}
        if (beside := path.with_suffix(".json")).is_file():
            try:
                tree = json.loads(_read(beside))
            except ValueError as error:
                raise RecordError(f"{beside.name} is damaged: {error}") from None
            if not isinstance(tree, dict):
                raise RecordError(f"{beside.name} holds no object")
            fields = tree
        if (beside := path.with_suffix(".txt")).is_file():
            fields["txt"] = _text(_read(beside), beside.name)
        elif "txt" not in fields:
            found = next((name for name in CAPTION_COLUMNS if name in fields), None)
            if found is None:
                raise RecordError(
                    f"no caption: neither {path.stem}.txt nor {path.stem}.json with a caption is beside it"
                )
            fields["txt"] = _caption(fields[found])
        return _read(path), fields


class _TableRecords(Records):
    """Rows with a column for the picture (a path, or its bytes), one for the caption, and others."""

    def __init__(self, source: Path, names: Sequence[str], columns: Columns) -> None:
        image, caption, key = columns
        self._source = source
        self._image = _column(source, names, image, IMAGE_COLUMNS, "picture")
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
        return [_key_of(str(value)) for value in self.column(self._key)]

    def owners(self) -> list[str]:
        if not self.has_paths():
            return self.keys()
        first: dict[Any, str] = {}
        return [first.setdefault(p, k) for p, k in zip(self.column(self._image), self.keys(), strict=True)]

    def has_paths(self) -> bool:
        """Whether the picture's column holds paths alone, which can be compared without reading pictures."""
        return False

    def load(self, number: int) -> tuple[bytes, Fields]:
        row = self.row(number)
        fields = {name: _plain(value) for name, value in row.items() if name not in (self._image, self._caption)}
        caption = row.get(self._caption)
        if isinstance(caption, (list, tuple)):
            fields[self._caption] = _plain(caption)
        return self._picture(row.get(self._image)), fields | {"txt": _caption(caption)}

    def _picture(self, value: Any) -> bytes:
        if isinstance(value, Mapping):  # the image column of a Hugging Face data set
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise RecordError(f"column {self._image!r} holds no path and no bytes")
        folder = self._source if self._source.is_dir() else self._source.parent
        return _read(folder / value)


class _RowRecords(_TableRecords):
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
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{source} cannot be read: {' '.join(str(error).split())}") from None
        if not self._rows or not all(isinstance(row, dict) for row in self._rows):
            raise UserError(f"{source} holds no rows with named columns")
        super().__init__(source, list(self._rows[0]), columns)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Mapping[str, Any]:
        # A row with more cells than the header has them under None.
        return {name: value for name, value in self._rows[number].items() if isinstance(name, str)}

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self._rows]

    def has_paths(self) -> bool:
        return all(isinstance(value, str) for value in self.column(self._image))


class _ArrowRecords(_TableRecords):
    """A folder written by Hugging Face's `save_to_disk`: Arrow streams, read where they lie."""

    def __init__(self, source: Path, columns: Columns) -> None:
        arrow = _pyarrow()
        files = json.loads((source / "state.json").read_text(encoding="utf-8"))["_data_files"]
        tables = [arrow.ipc.open_stream(arrow.memory_map(str(source / file["filename"]))).read_all() for file in files]
        self._table = arrow.concat_tables(tables)
        super().__init__(source, self._table.column_names, columns)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, number: int) -> Mapping[str, Any]:
        row: dict[str, Any] = self._table.slice(number, 1).to_pylist()[0]
        return row

    def column(self, name: str) -> list[Any]:
        return list(self._table.column(name).to_pylist())


class _ParquetRecords(_TableRecords):
    """A Parquet file, read a row group at a time."""

    ordered = True

    def __init__(self, source: Path, columns: Columns) -> None:
        arrow = _pyarrow()
        try:
            self._file = arrow.parquet.ParquetFile(source, memory_map=True)
        except (OSError, arrow.ArrowException) as error:
            raise UserError(f"{source} cannot be read: {' '.join(str(error).split())}") from None
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        # A few groups: as many as threads are likely to be at.
        self._group = lru_cache(maxsize=4)(self._file.read_row_group)
        super().__init__(source, self._file.schema_arrow.names, columns)

    def __len__(self) -> int:
        return len(self._places)

    def row(self, number: int) -> Mapping[str, Any]:
        group, place = self._places[number]
        row: dict[str, Any] = self._group(group).slice(place, 1).to_pylist()[0]
        return row

    def column(self, name: str) -> list[Any]:
        return list(self._file.read(columns=[name]).column(name).to_pylist())

    def has_paths(self) -> bool:
        return str(self._file.schema_arrow.field(self._image).type) in ("string", "large_string")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "reading Parquet and Hugging Face data sets needs pyarrow: pip install 'mmssl[parquet]'"
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


def _key_of(name: str) -> str:
    """A name without dots, which would end a WebDataset key, and without what file names cannot hold."""
    return name.encode("utf-8", "replace").decode().strip("/").replace(".", "_").replace("\0", "_") or "_"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from None


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RecordError(f"{name} is not UTF-8 (byte {error.start})") from None


def _caption(value: Any) -> str:
    """A caption, or the first of several."""
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if not isinstance(value, str):
        raise RecordError(f"the caption is {type(value).__name__}, not text")
    return value


def _plain(value: Any) -> Any:
    """The value as JSON can hold it; bytes are left out."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
