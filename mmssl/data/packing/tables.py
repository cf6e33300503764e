"""From a path to the records behind it: a folder of images, one or several tables, or a Hugging Face dataset."""

import json
import os
import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from mmssl.data.packing.arrow_tables import ArrowRecords, ParquetRecords
from mmssl.data.packing.columns import MissingColumnError, listed
from mmssl.data.packing.folders import FolderRecords, join_apart
from mmssl.data.packing.listing import SIDECARS, ImageFile, Listing, list_folder
from mmssl.data.packing.records import Defects, RecordError, Records, read_head
from mmssl.data.packing.shard_records import ShardRecords
from mmssl.data.packing.table_records import JoinedRecords, Progress, TableOptions, TableRecords
from mmssl.data.packing.text_tables import JsonRecords, SeparatedRecords
from mmssl.data.shards import TABLES, SampleLimits
from mmssl.data.shards.account import UNOPENED
from mmssl.data.shards.damage import recognise
from mmssl.data.shards.urls import ARCHIVES, table_suffix
from mmssl.errors import UserError

_JSON = (".jsonl", ".ndjson", ".json")
_SIDECARS = tuple(f".{extension}" for extension in SIDECARS)
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
    need_captions: bool = True,
) -> Records:
    """Open a folder of images, a table, several tables, or a Hugging Face dataset saved with `save_to_disk`.

    Args:
        source: a file or folder, or a glob of tables.
        image_column, caption_column, key_column, separator, encoding: of tables; None: recognised.
        progress: called with the number of files of a folder, or of rows of a text table, that are read.
        limits: limits and names of members, for shards.
        need_captions: refuse images of a folder that have no caption.

    Raises:
        UserError: the source or a column is missing, or the source has several splits.
    """
    options = TableOptions(image_column, caption_column, key_column, separator, encoding)
    if source.is_dir():
        return _open_folder(source, options, progress, limits, need_captions)
    if source.is_file() and source.name.lower().endswith(ARCHIVES):
        return ShardRecords([str(source)], limits)
    if not source.is_file():
        found = sorted(map(Path, glob(str(source)))) if has_magic(str(source)) else []  # noqa: PTH207
        if found:
            return _open_tables(source, found, options, progress)
        raise UserError(f"{source} does not exist; give a folder of images, a {', '.join(TABLES)} file or a dataset")
    return _open_table(source, options, progress)


def _open_folder(
    folder: Path,
    options: TableOptions,
    progress: Progress | None,
    limits: SampleLimits | None,
    need_captions: bool,
) -> Records:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        raise UserError(f"{folder} has several splits; name one: {', '.join(str(folder / s) for s in splits)}")
    if (folder / "state.json").is_file():
        return ArrowRecords(folder, options)
    found = list_folder(folder, progress)
    if found.pair() is None and not found.metadata() and not found.archives:
        join_apart(folder, found)
    if found.pair() is not None:
        return _open_images(folder, found, options, need_captions)
    if found.archives and not found.metadata():
        records: Records = ShardRecords([str(folder / path) for path in found.archives], limits)
        records.beside = [*found.defects, *_unused(found.images, "shards lie beside the image, which has no caption")]
        return records
    problems: Defects = []
    tables = found.metadata() or _tables_with_pairs(folder, found, options, problems)
    if not tables:
        images = FolderRecords(folder, found, need_captions)
        images.beside = problems
        return images
    joined = _open_tables(folder, [folder / path for path in tables], options, progress)
    files = {os.path.abspath(folder / image.path): image for image in found.images}  # noqa: PTH100 - links stay
    named = set(joined.image_files(files))
    others = [image for path, image in files.items() if path not in named]
    defects = [defect for defect in found.defects if defect[0] not in tables]
    joined.beside = [*defects, *_unused(others, "no row of the table names the image")]
    return joined


def _unused(images: Sequence[ImageFile], cause: str) -> Defects:
    error = RecordError(cause, remedy="write its caption to NAME.txt beside it, and pack the images by themselves")
    return [(image.path, error) for image in images]


def _open_images(folder: Path, found: Listing, options: TableOptions, need_captions: bool) -> Records:
    """Images with their captions beside them. Tables of pairs that lie among them are left out, row by row.

    Raises:
        UserError: one of these tables describes the images, so that there are two captions for each.
    """
    pair = found.pair()
    if found.metadata() and pair is not None:
        raise UserError(
            f"{folder} describes its images twice, in {found.metadata()[0]} and in files beside them, such as "
            f"{pair.texts[0][1]}; give the table, {folder / found.metadata()[0]}, or move it away to use the files"
        )
    records = FolderRecords(folder, found, need_captions)
    records.beside = [
        defect
        for path in found.tables
        if table_suffix(path) not in _SIDECARS
        for defect in _rows_of(folder, path, options)
    ]
    return records


def _rows_of(folder: Path, path: str, options: TableOptions) -> Defects:
    """One defect per row of a table that lies among images with captions; none if it is no table of pairs."""
    try:
        rows = len(_open_table(folder / path, options, None))
    except UserError:
        return []
    remedy = "pack it by itself: mmssl shards pack TABLE --out FOLDER"
    error = RecordError("a table lies among images with captions", path, remedy)
    return [(f"{path}: row {number}", error) for number in range(1, rows + 1)]


def _tables_with_pairs(folder: Path, found: Listing, options: TableOptions, problems: Defects) -> list[str]:
    """The tables of a folder without captions beside its images, relative to it, if they are of one kind.

    Args:
        problems: gets the tables that cannot be read as pairs, without texts that are none.

    Raises:
        UserError: there are several of different columns, or the only ones that there are cannot be used.
    """
    usable: dict[str, TableRecords] = {}
    problem: UserError | None = None
    for path in sorted(found.tables):
        try:
            usable[path] = _open_table(folder / path, options, None)
        except UserError as error:
            problem = problem or error
            if table_suffix(path) not in _SIDECARS:
                detail = str(error).removeprefix(f"{folder / path} ")
                if isinstance(error, MissingColumnError):
                    detail = f"it has no {error.role} column; its columns are {listed(error.names)}"
                remedy = "give it by itself, with its columns: mmssl shards pack TABLE --image-column NAME"
                problems.append((path, RecordError(UNOPENED, detail, remedy)))
    if problem is not None and not usable and not found.images:
        raise problem
    kinds = {(records.form(), records.columns) for records in usable.values()}
    if len(kinds) > 1:
        names = ", ".join(str(folder / path) for path in list(usable)[:4])
        raise UserError(f"{folder} holds several tables of different columns; name one: {names}")
    return list(usable)


def _open_tables(
    source: Path, paths: Sequence[Path], options: TableOptions, progress: Progress | None
) -> TableRecords | JoinedRecords:
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
    head = read_head(path)
    foreign = recognise(head)
    if foreign is not None and not (suffix == ".parquet" and head.startswith(b"PAR1")):
        raise UserError("{} is {}; {}".format(path, *foreign))
    if suffix is None:
        raise UserError(f"{path} is not a {', '.join(TABLES)} file; give one of these, or a folder of images")
    if suffix == ".parquet":
        return ParquetRecords(path, options)
    return (JsonRecords if suffix in _JSON else SeparatedRecords)(path, options, progress)
