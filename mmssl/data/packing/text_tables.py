"""Tables in text files: CSV and its kin, JSON lines and JSON, held in memory as text."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mmssl.data.packing import dialect, encodings, values
from mmssl.data.packing.columns import Columns, Sample, Wanted, find_columns, roles
from mmssl.data.packing.records import Defects, RecordError
from mmssl.data.packing.table_records import SAMPLE, Progress, TableOptions, TableRecords
from mmssl.data.shards.urls import table_suffix
from mmssl.errors import UserError, one_line

_REPORTED = 5_000
"""Rows between two reports of progress."""


class _Store:
    """JSON values in memory, as their text: a fraction of the memory of Python's objects."""

    def __init__(self, progress: Progress | None) -> None:
        self._content = bytearray()
        self._starts = array("Q", [0])
        self._progress = progress

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Any:
        return json.loads(
            self._content[self._starts[number] : self._starts[number + 1]].decode("utf-8", "surrogatepass")
        )

    def append(self, text: str) -> None:
        """Add the JSON text of a value."""
        self._content += text.encode("utf-8", "surrogatepass")
        self._starts.append(len(self._content))
        if self._progress is not None and len(self) % _REPORTED == 0:
            self._progress(len(self))

    def digest(self) -> str:
        """A hash of all values."""
        return hashlib.blake2b(self._content, digest_size=16).hexdigest()


class TextRecords(TableRecords):
    """A table in memory."""

    def __init__(self, source: Path, columns: Columns, sample: Sample, rows: _Store, defects: Defects) -> None:
        """
        Raises:
            UserError: there is no row.
        """
        self._rows = rows
        self._defects = defects
        if not len(rows):
            raise _no_rows(source, defects)
        super().__init__(source, list(sample), columns, sample)

    def __len__(self) -> int:
        return len(self._rows)

    def identity(self) -> str:
        return f"{self._rows.digest()} {self.columns}"

    def defects(self) -> Defects:
        return [*self._defects, *self.beside]


class SeparatedRecords(TextRecords):
    """A table with separators, such as CSV: one line per row."""

    def __init__(self, source: Path, options: TableOptions, progress: Progress | None = None) -> None:
        separator = None if options.separator is None else dialect.parse_separator(options.separator)
        encoding = encodings.find_encoding(source, options.encoding)
        lines = encodings.read_lines(source, encoding)
        first = [line.removeprefix("\ufeff") for line in islice(lines, dialect.HEAD)]
        head, named = dialect.skip_preamble(first)
        found = dialect.detect(source, head, options.wanted(), separator or named)
        sample = dialect.sample(head, found)
        columns = find_columns(source, found.names, sample, options.wanted(), found.header)
        rows, defects = _Store(progress), Defects()
        for number, cells in dialect.read_rows(chain(head, lines), found, columns):
            if isinstance(cells, RecordError):
                defects.append((f"line {number}", cells))
            else:
                rows.append(json.dumps(cells, ensure_ascii=False))
        self._dialect, self._encoding = found, encoding
        self._places = {name: place for place, name in enumerate(found.names)}
        super().__init__(source, columns, sample, rows, defects)

    def row(self, number: int) -> Mapping[str, Any]:
        return dict(zip(self._dialect.names, self._rows[number], strict=True))

    def column(self, name: str) -> Iterator[Any]:
        place = self._places[name]
        return (self._rows[number][place] for number in range(len(self)))

    def form(self) -> str:
        separator = dialect.SEPARATORS.get(self._dialect.separator, repr(self._dialect.separator))
        header = "" if self._dialect.header else ", no header"
        return f"{separator}-separated, {encodings.display_name(self._encoding)}{header}"


class JsonRecords(TextRecords):
    """JSON objects: one per line, or in a list."""

    def __init__(self, source: Path, options: TableOptions, progress: Progress | None = None) -> None:
        self._encoding = encodings.find_encoding(source, options.encoding)
        rows, defects, names = _Store(progress), Defects(), dict[str, None]()
        first: list[Mapping[str, Any]] = []
        self._form = "JSON lines"
        lines = encodings.read_lines(source, self._encoding)
        head = "".join(islice(lines, 1))
        if table_suffix(source.name) == ".json" or head.removeprefix("\ufeff").lstrip().startswith("["):
            self._form, entries = "JSON", _json_file(source, "".join(chain([head], lines)), options.wanted())
        else:
            entries = _json_lines(chain([head], lines))
        for place, entry, text in entries:
            if isinstance(entry, RecordError):
                defects.append((place, entry))
                continue
            names.update(dict.fromkeys(entry))
            rows.append(text)
            if len(first) < SAMPLE:
                first.append(entry)
        if not first:
            raise _no_rows(source, defects)
        sample = {name: [row.get(name) for row in first] for name in names}
        columns = find_columns(source, list(names), sample, options.wanted(), header=True)
        super().__init__(source, columns, sample, rows, defects)

    def row(self, number: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._rows[number]
        return row

    def column(self, name: str) -> Iterator[Any]:
        return (self._rows[number].get(name) for number in range(len(self)))

    def form(self) -> str:
        return f"{self._form}, {encodings.display_name(self._encoding)}"


_Entry = tuple[str, Mapping[str, Any] | RecordError, str]
"""Place in the file, the object or the reason why it is none, and its JSON text."""


def _no_rows(source: Path, defects: Defects) -> UserError:
    if defects:
        place, error = defects[0]
        return UserError(f"{source} cannot be read: none of its {len(defects):,} rows is whole; {place}: {error}")
    return UserError(f"{source} has no rows with named columns; give a table with a row per image")


def _json_lines(lines: Iterable[str]) -> Iterator[_Entry]:
    """The objects of lines that hold one each. Blank lines do not count."""
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix("\ufeff").strip()
        if text:
            yield f"line {number}", _parse(text), text


def _parse(text: str) -> Mapping[str, Any] | RecordError:
    remedy = 'write one object per line, such as {"image": "a.jpg", "caption": "a cat"}'
    if encodings.is_damaged(text):
        return RecordError("the line is not of the table's encoding", remedy="name the encoding: --encoding cp1252")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        return RecordError("the line is not JSON", reason, remedy)
    return value if isinstance(value, dict) else RecordError("the line is not a JSON object", remedy=remedy)


def _json_file(source: Path, text: str, wanted: Wanted) -> Iterator[_Entry]:
    """The objects of a file: one list of them, COCO's lists of images and annotations, or JSON lines.

    An object from names of images to captions, or to objects, counts as a list of these; so do the forms of pandas.

    Raises:
        UserError: the file holds nothing of the kind.
    """
    text = text.removeprefix("\ufeff")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = text.splitlines()
        if len(lines) > 1 and isinstance(_parse(lines[0]), dict):
            return _json_lines(lines)
        raise UserError(f"{source} cannot be read: {one_line(error)}") from None
    lists = [tree] if isinstance(tree, list) else list(tree.values()) if isinstance(tree, dict) else []
    lists = [value for value in lists if isinstance(value, list) and value and isinstance(value[0], dict)]
    if isinstance(tree, dict) and all(isinstance(tree.get(name), list) for name in ("images", "annotations")):
        lists = [_join_coco(tree["images"], tree["annotations"])]
    if isinstance(tree, dict) and tree and not lists:
        lists = [_rows_of_object(tree, wanted)]
    if len(lists) != 1:
        raise UserError(f"{source} holds {len(lists)} lists of objects; give a file with one list, an object per image")
    return _objects(lists[0])


def _rows_of_object(tree: Mapping[str, Any], wanted: Wanted) -> list[Any]:
    """The rows of one object: images by name, the forms in which pandas writes tables, or a single row."""
    cells = list(tree.values())
    if all(map(values.is_image, tree)):
        return [_named_image(name, value) for name, value in tree.items()]
    names, data = tree.get("columns"), tree.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(map(str, names), row, strict=False)) for row in data]  # orient="split"
    if roles(list(tree), wanted) == 2 and all(isinstance(cell, dict) for cell in cells):  # orient="columns"
        return [{name: column.get(row) for name, column in tree.items()} for row in cells[0]]
    if roles(list(tree), wanted) == 2 and all(isinstance(cell, list) and len(cell) == len(cells[0]) for cell in cells):
        return [dict(zip(tree, row, strict=True)) for row in zip(*cells, strict=True)]
    if len(cells) > 1 and all(isinstance(cell, dict) for cell in cells):  # orient="index"
        return cells
    return [tree]


def _named_image(name: str, value: Any) -> dict[str, Any]:
    """The row of an image whose name leads to its caption, captions or fields."""
    return {"image": name, **value} if isinstance(value, dict) else {"image": name, "caption": value}


def _objects(found: Sequence[Any]) -> Iterator[_Entry]:
    for number, entry in enumerate(found, start=1):
        place = f"object {number}"
        error = RecordError("the entry is not a JSON object", remedy="write an object per image")
        yield place, entry if isinstance(entry, dict) else error, json.dumps(entry, ensure_ascii=False)


def _join_coco(images: Sequence[Any], annotations: Sequence[Any]) -> list[Any]:
    """The annotations of COCO, each with the fields of its image; then the images without one."""
    waiting = {str(image.get("id")): image for image in images if isinstance(image, dict)}
    owners = [str(entry.get("image_id")) if isinstance(entry, dict) else "" for entry in annotations]
    rows = [
        {**waiting.get(owner, {}), **entry} if isinstance(entry, dict) else entry
        for owner, entry in zip(owners, annotations, strict=True)
    ]
    named = set(owners)
    return [*rows, *(image for number, image in waiting.items() if number not in named)]
