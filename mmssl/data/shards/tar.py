"""A reader of tars that trusts no byte of them: names, offsets and sizes of the members.

It reads regular members of ustar, GNU (long names) and pax archives. Every other kind is refused by name.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from mmssl.data.shards.headers import (
    BLOCK,
    EXTENSIONS,
    MAX_EXTENSION_BYTES,
    Extensions,
    TarError,
    check_block,
    name_of,
    padded,
    size_of,
)

_FOLDER = "folder"
_OTHERS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": _FOLDER,
    b"6": "pipe",
    b"S": "sparse file",
}
_OLD_FILE = b"\0"
_FILES = (b"0", _OLD_FILE, b"7")

ReadAt = Callable[[int, int], bytes]
"""`read(offset, count)` returns `count` bytes, or fewer at the end of the archive."""


class Member(NamedTuple):
    """A file inside a tar. Offsets count bytes from the start of the archive."""

    name: str
    start: int
    """Offset of its first header, including long-name and pax headers."""
    data: int
    """Offset of its first byte."""
    size: int
    refused: str | None = None
    """Reason to refuse the member, or None."""

    @property
    def end(self) -> int:
        """Offset of the next header."""
        return self.data + padded(self.size)


class Archive:
    """The files of a tar of `size` bytes, read through `read`."""

    def __init__(self, read: ReadAt, size: int) -> None:
        self.read = read
        self.size = size
        self.end = 0
        """Current offset: after the last member once all are read."""

    def members(self) -> Iterator[Member]:
        """All files in order, without folders.

        Stops at the end marker (a block of zeros) or at the end of the bytes.

        Raises:
            TarError: a header is damaged, a member reaches past `size`, or tar readers differ on where the next begins.
        """
        self.end = 0
        while (member := self._member(self.end)) is not None:
            self.end = member.end
            if member.refused != _FOLDER:
                yield member

    def _member(self, start: int) -> Member | None:
        """The file whose first header is at `start`, or None at the end."""
        position, before = start, Extensions()
        while (block := self._block(position)) is not None:
            kind, data = block[156:157], position + BLOCK
            if kind not in EXTENSIONS:
                return self._file(block, start, data, before)
            count = size_of(block, position)
            before.add(kind, self._extension(data, count, position), position)
            position = data + padded(count)
        if position != start:
            raise TarError("the archive ends after a long name", start)
        return None

    def _file(self, block: bytes, start: int, data: int, before: Extensions) -> Member:
        """The member of a header, whose bytes begin at `data`."""
        kind, (name, refused) = block[156:157], name_of(block)
        name = name if before.name is None else before.name
        if "\n" in name:
            # Printed as it is, it could look like a line of mmssl's own.
            name, refused = name.replace("\n", "\\n"), "name with a line break"
        count = size_of(block, data - BLOCK) if before.size is None else before.size
        what = _kind_of(kind, name, block)
        disputed = before.disputed
        if what is not None and (count or kind == b"S"):
            # Readers skip these bytes or take them for the next header; that of a sparse file may have more blocks.
            disputed = disputed or f"{what} of {count} bytes"
        if disputed is not None:
            raise TarError(f"{name!r} is refused ({disputed})", start, name, f"is refused: {disputed}")
        if data + padded(count) > self.size:
            present = self.size - data
            missing = f"{count} bytes promised, {present} present" if count > present else "its last block is not full"
            raise TarError(f"{name!r} is cut: {missing}", start, name)
        return Member(name, start, data, count, what or before.refused or refused or _name_refusal(name))

    def _extension(self, data: int, count: int, position: int) -> bytes:
        """The content of a long name or of pax records."""
        if count > MAX_EXTENSION_BYTES:
            raise TarError("damaged header (a name of more than 1 MiB)", position)
        content = self.read(data, padded(count))
        if len(content) < padded(count):
            raise TarError("the archive ends inside a long name", position)
        # Python's tarfile reads on in the padding.
        if content[count:].strip(b"\0"):
            raise TarError("damaged header (bytes behind a long name)", position)
        return content[:count]

    def _block(self, position: int) -> bytes | None:
        """The header at `position`, or None at the end of the archive."""
        if position >= self.size:
            return None
        block = self.read(position, BLOCK)
        if not block:
            return None
        if len(block) < BLOCK:
            raise TarError("the archive ends inside a header", position)
        if block[0] == 0 and block.count(0) == BLOCK:
            return None
        check_block(block, position)
        return block


def _kind_of(kind: bytes, name: str, block: bytes) -> str | None:
    """What a member is, in words; None for a regular file."""
    if kind not in _FILES:
        return _OTHERS.get(kind, f"member of unknown type {kind!r}")
    # The header's own name counts for Python's tarfile, and the final one for others.
    old_name = block[:100].partition(b"\0")[0] if kind == _OLD_FILE else b""
    return _FOLDER if name.endswith("/") or old_name.endswith(b"/") else None


def _name_refusal(name: str) -> str | None:
    return "name that leaves the folder" if name.startswith("/") or ".." in name.split("/") else None
