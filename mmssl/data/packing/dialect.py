"""The dialect of a text table: separator, quoting and header, recognised from its first lines; and its rows."""

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mmssl.data.packing import values
from mmssl.data.packing.columns import Columns, Wanted, distinct, roles
from mmssl.data.packing.encodings import is_damaged
from mmssl.data.packing.records import RecordError
from mmssl.errors import UserError

SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "pipe"}
"""Separators that are recognised, and their names."""
HEAD = 200
"""Lines from which the dialect is recognised."""
_LOOKAHEAD = 500
"""Lines that one quoted cell may fill. A quote that is not closed until then is no quote of a cell."""

Rows = Iterator[tuple[int, list[str] | RecordError]]
"""Line number and cells of each row, or the reason why it is none."""


@dataclass(frozen=True)
class Dialect:
    """The form of a text table."""

    separator: str
    quoted: bool
    """True if quotes enclose cells, as in CSV. False: quotes are text, as in the tab-separated tables of CC3M."""
    header: bool
    """True if the first line names the columns. False: they are numbered from 1."""
    names: tuple[str, ...]
    """Names of the columns, each once."""


def parse_separator(text: str) -> str:
    """A separator as the user writes it: one character, or `tab`, `comma`, `semicolon`, `pipe`, `\\t`.

    Raises:
        UserError: it is none.
    """
    words = {name: separator for separator, name in SEPARATORS.items()} | {"\\t": "\t"}
    found = words.get(text.lower(), text)
    if len(found) != 1 or found in '"\r\n':
        raise UserError(f"separator {text!r} is not one character; give for example tab, ';' or '|'")
    return found


def skip_preamble(lines: Sequence[str]) -> tuple[list[str], str | None]:
    """The first lines, those that stand before the header emptied: comments, and Excel's `sep=;`, which is returned."""
    found = list(lines)
    separator = None
    for number, line in enumerate(lines):
        named = re.fullmatch(r"sep=(.)\s*", line, re.IGNORECASE)
        if named is None and line.strip() and not _is_comment(line, lines[number + 1 :]):
            break
        separator = separator if named is None else named.group(1)
        found[number] = "\n"
    return found, separator


def _is_comment(line: str, following: Sequence[str]) -> bool:
    """True for `# exported by ...`, which has fewer separators than the rows behind it."""
    rows = [other for other in following if other.strip() and not other.startswith("#")][:2]
    most, *others = (max(other.count(separator) for separator in SEPARATORS) for other in (line, *rows))
    return line.startswith("#") and len(others) > 0 and most < min(others)


def detect(source: Path, lines: Sequence[str], wanted: Wanted, separator: str | None) -> Dialect:
    """Recognise the dialect of a table.

    Args:
        lines: its first lines, at most `HEAD`.
        wanted: columns that the user named; they tell the separator and the header.
        separator: the given one; None: recognised.

    Raises:
        UserError: no separator splits the lines.
    """
    filled = [line for line in lines if line.strip()]
    if not filled:
        raise UserError(f"{source} has no rows: it is empty; give a table with a line per image")
    tabs_first = Path(source.name.removesuffix(".gz")).suffix.lower() in (".tsv", ".tab")
    usual = sorted(SEPARATORS, key=lambda s: (s != "\t") == tabs_first)
    candidates = [separator] if separator is not None else usual
    best = max(candidates, key=lambda candidate: _score(filled, candidate, wanted))
    cells = _split(filled[0], best)
    if len(cells) < 2:
        shown = values.shorten(filled[0].strip())
        tried = ", ".join(SEPARATORS.values()) if separator is None else repr(separator)
        raise UserError(
            f"{source} is not a table: its first line {shown} has no separator ({tried}); name it: --separator ';'"
        )
    header = not any(values.is_image(cell) or values.is_web(cell) for cell in cells)
    names = distinct(cells) if header else [str(place) for place in range(1, len(cells) + 1)]
    enclosed = [cell.strip() for cell in filled[0].rstrip("\r\n").split(best)]
    all_quoted = all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in enclosed)
    return Dialect(
        best, best != "\t" or all_quoted, header, tuple(_with_index(names, filled, best) if header else names)
    )


def sample(lines: Sequence[str], dialect: Dialect) -> dict[str, list[str]]:
    """Column -> its cells in the first lines of a table, to tell what it holds."""
    filled = [line for line in lines if line.strip()]
    rows = [_split(line, dialect.separator) for line in filled[dialect.header :]]
    whole = [row for row in rows if len(row) >= len(dialect.names)]
    return {name: [row[place] for row in whole] for place, name in enumerate(dialect.names)}


def read_rows(lines: Iterator[str], dialect: Dialect, columns: Columns) -> Rows:
    """The rows of a table, without its header and blank lines.

    A line that does not have one cell per column is repaired where only one reading is possible: separators in a
    caption that no quotes enclose, quotes that are text, or cells missing at the end.
    """
    csv.field_size_limit(sys.maxsize)
    for number, cells in _RowReader(lines, dialect, columns):
        if isinstance(cells, RecordError) or any(cells):
            yield number, cells


class _RowReader:
    """Rows of lines, with a look ahead for cells of several lines."""

    def __init__(self, lines: Iterator[str], dialect: Dialect, columns: Columns) -> None:
        self._lines = lines
        self._ahead: list[str] = []
        self._separator = dialect.separator
        self._quoted = dialect.quoted
        self._names = list(dialect.names)
        self._image = self._names.index(columns.image)
        self._caption = self._names.index(columns.caption)
        self._number = 0
        self._skip_header = dialect.header

    def __iter__(self) -> Rows:
        while (line := self._take()) is not None:
            number = self._number
            if not line.strip():
                continue
            if self._skip_header:
                self._skip_header = False
                continue
            cells = self._parse(line, number)
            if isinstance(cells, list) and any(map(is_damaged, cells)):
                remedy = "correct the line, or name the encoding of the table: --encoding cp1252"
                yield number, RecordError("the line is not of the table's encoding", remedy=remedy)
            else:
                yield number, cells

    def _take(self) -> str | None:
        line = self._ahead.pop(0) if self._ahead else next(self._lines, None)
        self._number += line is not None
        return line

    def _parse(self, line: str, number: int) -> list[str] | RecordError:
        width = len(self._names)
        literal = self._without_surplus(_literal(line, self._separator))
        if '"' not in line:
            return literal if len(literal) == width else self._repair(line, number)
        if not self._quoted and len(literal) == width:
            return [_without_quotes(cell) for cell in literal]
        quoted = self._quoted_cells(line)
        if quoted is not None:
            return quoted
        return literal if len(literal) == width else self._repair(line, number)

    def _quoted_cells(self, line: str) -> list[str] | None:
        """The cells of a record that may go on for several lines, which are then taken; None if quotes are text."""
        used = 0

        def feed() -> Iterator[str]:
            nonlocal used
            yield line
            while used < _LOOKAHEAD:
                if used == len(self._ahead):
                    following = next(self._lines, None)
                    if following is None:
                        return
                    self._ahead.append(following)
                used += 1
                yield self._ahead[used - 1]

        # Databases write \" within a cell, spreadsheets "".
        escape = "\\" if '\\"' in line else None
        try:
            reader = csv.reader(
                feed(),
                delimiter=self._separator,
                skipinitialspace=True,
                strict=True,
                escapechar=escape,
                doublequote=escape is None,
            )
            cells = self._without_surplus([cell.strip() for cell in next(reader)])
        except (csv.Error, StopIteration):
            return None
        if len(cells) != len(self._names) or any(self._is_row(line) for line in self._ahead[:used]):
            return None
        self._number += used
        del self._ahead[:used]
        return cells

    def _without_surplus(self, cells: list[str]) -> list[str]:
        """The cells without empty ones behind the last column, which separators at the end of a line make."""
        width = len(self._names)
        return cells[:width] if len(cells) > width and not any(cells[width:]) else cells

    def _is_row(self, line: str) -> bool:
        """True if a line is a row by itself: an open quote must not swallow it."""
        cells = _literal(line, self._separator)
        return len(cells) == len(self._names) and values.is_image(cells[self._image])

    def _repair(self, line: str, number: int) -> list[str] | RecordError:
        """One cell per column, if only one reading is possible."""
        cells = line.rstrip("\r\n").split(self._separator)
        width, found = len(self._names), len(cells)
        if max(self._image, self._caption) < found < width and values.is_image(cells[self._image]):
            return [cell.strip() for cell in cells] + [""] * (width - found)
        shown = f"{found} of {width}"
        if found < width:
            return RecordError("the row has too few cells", shown, "complete the line")
        joined = self._join_caption(cells)
        if joined is not None:
            return joined
        remedy = "put double quotes around cells that contain the separator"
        return RecordError("the row has too many cells", shown, remedy)

    def _join_caption(self, cells: list[str]) -> list[str] | None:
        """Cells with the pieces of the caption joined; None if they may belong to another column."""
        width, extra = len(self._names), len(cells) - len(self._names)
        if self._caption not in (0, width - 1):
            return None
        pieces = cells[self._caption : self._caption + extra + 1]
        kept = [*cells[: self._caption], self._separator.join(pieces), *cells[self._caption + extra + 1 :]]
        kept = [cell.strip() for cell in kept]
        others = [cell for place, cell in enumerate(kept) if place not in (self._image, self._caption)]
        # Another column of text may hold the surplus separators just as well.
        return kept if values.is_image(kept[self._image]) and all(map(_is_plain, others)) else None


def _score(lines: Sequence[str], separator: str, wanted: Wanted) -> tuple[int, float, float]:
    """How well a separator fits: known names, cells that are images, and lines with as many cells as the first."""
    first = _split(lines[0], separator)
    rows = [_literal(line, separator) for line in islice(lines, 1 if len(lines) > 1 else 0, None)]
    images = sum(any(_is_whole_image(cell) for cell in row) for row in rows) / max(len(rows), 1)
    even = sum(len(row) == len(first) for row in rows) / max(len(rows), 1) if len(first) > 1 else 0.0
    return (roles(first, wanted) if len(first) > 1 else 0, round(images, 1) if len(first) > 1 else 0.0, even)


def _is_whole_image(cell: str) -> bool:
    """True for an image in a cell that no other separator would split."""
    return values.is_image(cell) and not any(separator in cell for separator in SEPARATORS)


def _split(line: str, separator: str) -> list[str]:
    """The cells of one line, with quotes where they enclose cells."""
    try:
        return [c.strip() for c in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]
    except csv.Error:
        return _literal(line, separator)


def _literal(line: str, separator: str) -> list[str]:
    """The cells of one line, with quotes as text."""
    return [cell.strip() for cell in line.rstrip("\r\n").split(separator)]


def _without_quotes(cell: str) -> str:
    """A cell without the quotes that a program put around it: only those in which inner quotes are doubled tell so."""
    inner = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _is_plain(cell: str) -> bool:
    """True for a number or nothing: a cell in which no text goes on."""
    return re.fullmatch(r"[-+\d.]*", cell) is not None


def _with_index(names: Sequence[str], lines: Sequence[str], separator: str) -> Sequence[str]:
    """Names with one for the row numbers that R's write.table puts before each row, but not into the header."""
    rows = [_split(line, separator) for line in lines[1:]]
    if rows and all(len(row) == len(names) + 1 for row in rows):
        firsts = [row[0] for row in rows]
        if firsts in ([str(i) for i in range(start, start + len(rows))] for start in (0, 1)):
            return distinct(["", *names])
    return names
