"""What can be packed into shards: a folder of images, a table of paths and captions, a Hugging Face data set."""

import json
from pathlib import Path

from mmssl.data.packing.record import (
    CAPTION_COLUMNS,
    Fields,
    RecordError,
    Records,
    as_text,
    find_caption,
    read_file,
    record_key,
)
from mmssl.data.packing.tables import ArrowRecords, ParquetRecords, RowRecords
from mmssl.data.shards.samples import IMAGES
from mmssl.data.shards.urls import TABLES
from mmssl.errors import UserError


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
            return ArrowRecords(source, columns)
        return _FolderRecords(source)
    if not source.is_file():
        raise UserError(f"{source} does not exist; give a folder of images, a {', '.join(TABLES)} file or a data set")
    if source.suffix not in TABLES:
        raise UserError(f"{source} is none of {', '.join(TABLES)}; give one of these, or a folder of images")
    return ParquetRecords(source, columns) if source.suffix == ".parquet" else RowRecords(source, columns)


class _FolderRecords(Records):
    """Images anywhere below a folder, each with NAME.txt or NAME.json beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = (path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGES and path.is_file())
        self._paths = sorted(files)
        if not self._paths:
            raise UserError(f"{folder} holds no image; the extensions are {', '.join(IMAGES)}")

    def keys(self) -> list[str]:
        return [record_key(path.relative_to(self._folder).with_suffix("").as_posix()) for path in self._paths]

    def load(self, number: int) -> tuple[bytes, Fields]:
        path = self._paths[number]
        fields: Fields = {}
        if (beside := path.with_suffix(".json")).is_file():
            try:
                tree = json.loads(read_file(beside))
            except (ValueError, RecursionError) as error:
                raise RecordError(f"{beside.name} is damaged: {error}") from None
            if not isinstance(tree, dict):
                raise RecordError(f"{beside.name} holds no object")
            fields = tree
        if (beside := path.with_suffix(".txt")).is_file():
            fields["txt"] = as_text(read_file(beside), beside.name)
        elif "txt" not in fields:
            found = next((name for name in CAPTION_COLUMNS if name in fields), None)
            if found is None:
                raise RecordError(
                    f"no caption: neither {path.stem}.txt nor {path.stem}.json with a caption is beside it"
                )
            fields["txt"] = find_caption(fields[found])
        return read_file(path), fields
