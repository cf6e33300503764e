"""Tables of Apache Arrow: Parquet files, and Hugging Face datasets saved on disk."""

import hashlib
import json
import os
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from threading import Lock, local
from typing import Any
from weakref import WeakValueDictionary

from mmssl.data.packing.columns import find_columns
from mmssl.data.packing.table_records import SAMPLE, TableOptions, TableRecords
from mmssl.errors import UserError, one_line

_FOOTER_BYTES = 1 << 20
"""Bytes at the end of a Parquet file that contain its metadata."""
_BATCH = 256
"""Rows of a Parquet column that are decoded together; images may be large."""


class ArrowRecords(TableRecords):
    """A folder written by Hugging Face's `save_to_disk`: memory-mapped Arrow streams."""

    def __init__(self, source: Path, options: TableOptions) -> None:
        arrow = _pyarrow()
        try:
            self._state = (source / "state.json").read_bytes()
            names = [file["filename"] for file in json.loads(self._state)["_data_files"]]
            streams = [arrow.ipc.open_stream(arrow.memory_map(str(source / name))) for name in names]
            self._table = arrow.concat_tables([stream.read_all() for stream in streams])
        except (OSError, ValueError, TypeError, KeyError, arrow.ArrowException) as error:
            raise UserError(f"{source} is not a complete dataset of save_to_disk ({error!r}); save it again") from None
        if not len(self):
            raise UserError(f"{source} has no rows; give a dataset with a row per image")
        columns = self._table.column_names
        sample = self._table.slice(0, SAMPLE).to_pydict()
        found = find_columns(source, columns, sample, options.wanted(), header=True)
        super().__init__(source, columns, found, sample)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, number: int) -> Mapping[str, Any]:
        row: dict[str, Any] = self._table.slice(number, 1).to_pylist()[0]
        return row

    def identity(self) -> str:
        return f"{_digest(self._state)} {self.columns}"  # contains the fingerprint of the datasets library

    def column(self, name: str) -> Iterator[Any]:
        return (value.as_py() for value in self._table.column(name))

    def form(self) -> str:
        return "Arrow"


class ParquetRecords(TableRecords):
    """A Parquet file, read one row group at a time."""

    ordered = True

    def __init__(self, source: Path, options: TableOptions) -> None:
        arrow = _pyarrow()
        try:
            self._file = arrow.parquet.ParquetFile(source, memory_map=True)
            sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
            if not sum(sizes):
                raise UserError(f"{source} has no rows; give a table with a row per image")
            sample = next(self._file.iter_batches(SAMPLE)).to_pydict()
        except (OSError, arrow.ArrowException) as error:
            raise UserError(f"{source} cannot be read: {one_line(error)}") from None
        self._ends: list[int] = list(accumulate(sizes))
        self._groups = _RowGroups(self._file.read_row_group)
        names = self._file.schema_arrow.names
        found = find_columns(source, names, sample, options.wanted(), header=True)
        super().__init__(source, names, found, sample)

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, number: int) -> Mapping[str, Any]:
        group = bisect(self._ends, number)
        first = self._ends[group - 1] if group else 0
        row: dict[str, Any] = self._groups.at(group).slice(number - first, 1).to_pylist()[0]
        return row

    def identity(self) -> str:
        with self.source.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _FOOTER_BYTES))
            return f"{_digest(file.read() + size.to_bytes(8, 'little'))} {self.columns}"

    def column(self, name: str) -> Iterator[Any]:
        for batch in self._file.iter_batches(_BATCH, columns=[name]):
            yield from batch.column(0).to_pylist()

    def form(self) -> str:
        return "Parquet"


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


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
