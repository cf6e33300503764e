"""Reading and writing files: atomic replacement, JSON, JSON Lines, CSV and checksums."""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from mmssl import system

_PARTIAL = ".part"
"""End of the name of a file that is being written."""
_WRITER = re.compile(rf"\.([0-9a-f]{{8}})-(\d{{1,10}})-\w+{re.escape(_PARTIAL)}$")
"""Computer and process that write a file, in its name."""
_PARTIAL_SECONDS = 24 * 3600.0
LONGEST_CELL = 2**31 - 1
"""Characters that a CSV cell may have when it is read: a caption may be long."""


def atomic_write(path: Path, content: bytes | Callable[[Path], object], durable: bool = False) -> None:
    """Replace a file so that readers see the old or the new one, never a part of it.

    Args:
        content: the bytes, or a function that writes a file at the path it is given.
        durable: flush to the disk before the replacement.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    prefix = f".{path.name[:40]}.{_place()}-{os.getpid()}-"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=_PARTIAL)
    os.close(handle)
    partial = Path(name)
    try:
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            content(partial)
        if durable:
            sync(partial)
        partial.chmod(0o644)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partial_files(folder: Path) -> None:
    """Delete what killed writers left of files in a folder. A file whose writer may still run stays.

    On the same computer the writer is looked up. Elsewhere it counts as gone a day after it wrote last.
    """
    here, now = _place(), time.time()
    for path in folder.glob(f".*{_PARTIAL}"):
        named = _WRITER.search(path.name)
        if named is None:
            continue
        with suppress(OSError):  # renamed or removed meanwhile, or it belongs to another user
            if named[1] != here:
                left = now - path.stat().st_mtime > _PARTIAL_SECONDS
            else:
                left = system.process_start(int(named[2])) is None
            if left:
                path.unlink()


def _place() -> str:
    """This computer since it started, and the numbering of its processes, in eight letters."""
    return hashlib.sha256(system.machine().encode()).hexdigest()[:8]


def open_regular(path: str | Path) -> FileIO:
    """A file opened for reading, unbuffered. Raises OSError like `regular_handle`."""
    return FileIO(regular_handle(path))


def regular_handle(path: str | Path) -> int:
    """The handle of a file opened for reading.

    Raises:
        OSError: it cannot be opened, or it is a folder, a device, a socket or a named pipe, which could block for ever.
    """
    # Without waiting, since opening a named pipe waits for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return handle


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk. Windows has no such call for folders."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, tree: Any) -> None:
    """Write JSON atomically; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(path, f"{text}\n".encode())


@dataclass
class JsonLines:
    """A JSON Lines file as far as it can be read. Logs are cut by kills and damaged by disks."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """The text of each row."""
    damaged: list[bytes] = field(default_factory=list)
    """Complete lines that are no JSON object in UTF-8."""
    cut: bytes = b""
    """A last line without a line break that is not complete."""


def read_json_lines(path: Path) -> JsonLines:
    """Read a JSON Lines file. A missing one is empty; a last line that lacks only its line break counts.

    Raises:
        OSError: it cannot be read.
    """
    found = JsonLines()
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines):
        text = line.strip()
        try:
            # Decoded here: json would take bytes with NULs for UTF-16.
            row = json.loads(text.decode("utf-8")) if text else None
        except (ValueError, RecursionError):
            row = text
        if isinstance(row, dict):
            found.rows.append(row)
            found.lines.append(text.decode("utf-8"))
        elif text and number == len(lines) - 1:
            found.cut = line
        elif text:
            found.damaged.append(line)
    return found


def append_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows in one write, so that other processes may append too. A cut last line stays a line of its own.

    Raises:
        OSError: the file cannot be written.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())


def set_lines_aside(path: Path, lines: Iterable[bytes]) -> Path:
    """Write damaged lines of a log to the first free of NAME.damaged, NAME.damaged-2, ...; returns its path."""
    place = unused_path(path, "damaged")
    atomic_write(place, b"".join(line + b"\n" for line in lines))
    return place


def set_aside(path: Path) -> Path:
    """Rename a file or folder that cannot be used to the first free of NAME.damaged, NAME.damaged-2, ...

    Returns: its new path.

    Raises:
        OSError: it cannot be renamed.
    """
    return path.rename(unused_path(path, "damaged"))


def unused_path(path: Path, suffix: str) -> Path:
    """The first of PATH.SUFFIX, PATH.SUFFIX-2, ... that does not exist."""
    found, number = path.with_name(f"{path.name}.{suffix}"), 1
    while found.exists() or found.is_symlink():
        number += 1
        found = path.with_name(f"{path.name}.{suffix}-{number}")
    return found


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all in it. A missing one is no error, and neither is a failure."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


_FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""Text that a spreadsheet takes for a formula, or that `write_csv` would confuse with a marked one."""


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; None is an empty cell.

    Text that a spreadsheet would run as a formula is marked by an apostrophe in front. `read_csv` removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(map(_marked, header))
        writer.writerows(map(_marked, row) for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table by column name."""
    csv.field_size_limit(min(LONGEST_CELL, sys.maxsize))
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = [_unmarked(cell) for cell in next(reader, [])]
        return [dict(zip(header, map(_unmarked, row), strict=False)) for row in reader if row]


def _marked(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def _unmarked(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
