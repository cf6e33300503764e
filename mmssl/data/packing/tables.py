"""From a path to the records behind it: a folder of images, one or several tables, or a Hugging Face dataset."""

import json
import os
import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from mmssl.data.packing.arrow_tables import ArrowRecords, ParquetRecords
from mmssl.data.packing.folders import FolderRecords, holds_pairs
from mmssl.data.packing.records import Records
from mmssl.data.packing.shard_records import ShardRecords
from mmssl.data.packing.table_records import JoinedRecords, Progress, TableOptions, TableRecords
from mmssl.data.packing.text_tables import JsonRecords, SeparatedRecords
from mmssl.data.shards import TABLES, SampleLimits
from mmssl.data.shards.urls import ARCHIVES, table_suffix
from mmssl.errors import UserError

_JSON = (".jsonl", ".ndjson", ".json")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of Hugging Face's ImageFolder, beside their images."""
_SPLIT = re.compile(r"(train|training|valid|validation|val|dev|test|testing)(?![a-z])", re.IGNORECASE)


def open_records(
    source: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    key_column: str | None = None,
    *,
    separator: str | None = None,
    encoding: str | None = None,
    progress: Progress | None = None,
    limits: SampleLimits | None = None,
) -> Records:
    """Open a folder of images, a table, several tables, or a Hugging Face dataset saved with `save_to_disk`.

    Args:
        source: a file or folder, or a glob of tables.
        image_column, caption_column, key_column, separator, encoding: of tables; None: recognised.
        progress: called with the number of rows of a text table that are read.
        limits: limits and names of members, for shards.

    Raises:
        UserError: the source or a column is missing, or the source has several splits.
    """
    options = TableOptions(image_column, caption_column, key_column, separator, encoding)
    if source.is_dir():
        return _open_folder(source, options, progress, limits)
    if source.is_file() and source.name.lower().endswith(ARCHIVES):
        return ShardRecords([str(source)], limits)
    if not source.is_file():
        found = sorted(map(Path, glob(str(source)))) if has_magic(str(source)) else []  # noqa: PTH207
        if found:
            return _open_tables(source, found, options, progress)
        raise UserError(f"{source} does not exist; give a folder of images, a {', '.join(TABLES)} file or a dataset")
    return _open_table(source, options, progress)


def _open_folder(
    folder: Path, options: TableOptions, progress: Progress | None, limits: SampleLimits | None
) -> Records:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        raise UserError(f"{folder} has several splits; name one: {', '.join(str(folder / s) for s in splits)}")
    if (folder / "state.json").is_file():
        return ArrowRecords(folder, options)
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    if shards and not holds_pairs(folder):
        return ShardRecords(shards, limits)
    metadata = sorted(path for name in _METADATA for path in folder.rglob(name))
    if metadata:
        return _open_tables(folder, metadata, options, progress)
    parquet = sorted(path for path in folder.rglob("*") if table_suffix(path.name) == ".parquet")
    if parquet and not holds_pairs(folder):
        return _open_tables(folder, parquet, options, progress)
    return FolderRecords(folder)


def _open_tables(source: Path, paths: Sequence[Path], options: TableOptions, progress: Progress | None) -> Records:
    """Several tables as one. Raises UserError if their names tell that they are splits, which must stay apart."""
    splits: dict[str, str] = {}
    for path in paths:
        inner = os.path.relpath(path, source if source.is_dir() else source.parent)
        found = _SPLIT.match(Path(inner).name) or _SPLIT.match(inner)
        if found is not None:
            splits.setdefault(found.group(1).lower(), str(path))
    if len(splits) > 1:
        raise UserError(f"{source} has several splits; name one, for example: {', '.join(splits.values())}")
    tables = [_open_table(path, options, progress) for path in paths]
    return tables[0] if len(tables) == 1 else JoinedRecords(tables)


def _open_table(path: Path, options: TableOptions, progress: Progress | None) -> TableRecords:
    suffix = table_suffix(path.name)
    if suffix is None:
        raise UserError(f"{path} is not a {', '.join(TABLES)} file; give one of these, or a folder of images")
    if suffix == ".parquet":
        return ParquetRecords(path, options)
    return (JsonRecords if suffix in _JSON else SeparatedRecords)(path, options, progress)
