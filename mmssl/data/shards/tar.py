"""A reader of tar headers that trusts no byte of them: names, offsets and sizes of the members.

It reads regular members of ustar, GNU (long names) and pax archives. Every other kind is refused by name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512
_MAX_EXTENSION_BYTES = 1 << 20
"""Longer names and pax records count as damage."""
_REFUSED = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "pipe",
    b"S": "sparse file",
}
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")

ReadAt = Callable[[int, int], bytes]
"""`read(offset, count)` returns `count` bytes, or fewer at the end of the archive."""


@dataclass(frozen=True)
class Member:
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


class TarError(ValueError):
    """The archive cannot be read further. `name` is the damaged member, if known."""

    def __init__(self, message: str, offset: int, name: str | None = None) -> None:
        super().__init__(f"{message} at byte {offset}")
        self.offset = offset
        self.name = name


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


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
            TarError: a header is damaged, or a member reaches past `size`.
        """
        self.end = 0
        while (member := self._member(self.end)) is not None:
            self.end = member.end
            if member.refused != "folder":
                yield member

    def _member(self, start: int) -> Member | None:
        """The file whose first header is at `start`, or None at the end."""
        position, long_name, pax = start, None, {}
        while (block := self._block(position)) is not None:
            kind, count, data = block[156:157], _number(block[124:136], position), position + BLOCK
            if kind in (b"L", b"K", b"x", b"X", b"g"):
                content = _extension(self.read, data, count, position)
                if kind == b"L":
                    long_name = _text(content)
                elif kind in (b"x", b"X"):
                    pax = _pax_records(content, position)
                position = data + padded(count)
                continue
            name = pax.get("path") or long_name or _name(block)
            if "size" in pax:
                count = _decimal(pax["size"], position)
            if kind in _WITHOUT_DATA:
                count = 0
            if data + count > self.size:
                message = f"{name!r} is cut: {count} bytes promised, {self.size - data} present"
                raise TarError(message, start, name)
            return Member(name, start, data, count, _refusal(kind, name, pax))
        if position != start:
            raise TarError("the archive ends after a long name", start)
        return None

    def _block(self, position: int) -> bytes | None:
        """The header at `position`, or None at the end of the archive."""
        if position >= self.size:
            return None
        block = self.read(position, BLOCK)
        if not block:
            return None
        if len(block) < BLOCK:
            raise TarError("the archive ends inside a header", position)
        if block.count(0) == BLOCK:
            return None
        _check_sum(block, position)
        return block


def _check_sum(block: bytes, position: int) -> None:
    stored = _number(block[148:156], position)
    rest = block[:148] + block[156:]
    if stored == sum(rest) + 256:
        return
    # Some old writers summed signed characters.
    if stored != sum(rest) + 256 - 256 * sum(byte > 127 for byte in rest):
        raise TarError("damaged header", position)


def _number(field: bytes, position: int) -> int:
    """Octal digits, or GNU's base-256 for larger numbers."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip() or b"0"
    if digits.strip(b"01234567"):
        raise TarError("damaged header", position)
    return int(digits, 8)


def _decimal(text: str, position: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise TarError("damaged pax header", position)
    return int(text)


def _extension(read: ReadAt, data: int, count: int, position: int) -> bytes:
    if count > _MAX_EXTENSION_BYTES:
        raise TarError("damaged header (a name of more than 1 MiB)", position)
    content = read(data, count)
    if len(content) < count:
        raise TarError("the archive ends inside a long name", position)
    return content


def _pax_records(content: bytes, position: int) -> dict[str, str]:
    """Records of the form `LENGTH key=value\\n`, where LENGTH counts the whole record."""
    records = {}
    content = content.rstrip(b"\0")
    begin = 0
    while begin < len(content):
        digits = content[begin : begin + 20].partition(b" ")[0]
        end = begin + _decimal(digits.decode("latin-1"), position)
        key, equals, value = content[begin + len(digits) + 1 : end].partition(b"=")
        if not equals or end > len(content) or value[-1:] != b"\n":
            raise TarError("damaged pax header", position)
        records[_text(key)] = _text(value[:-1])
        begin = end
    return records


def _name(block: bytes) -> str:
    name = _text(block[:100])
    has_prefix = block[257:263] == b"ustar\0" and block[345] != 0
    return f"{_text(block[345:500])}/{name}" if has_prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", errors="backslashreplace")


def _refusal(kind: bytes, name: str, pax: dict[str, str]) -> str | None:
    if kind in _REFUSED:
        return _REFUSED[kind]
    if any(key.startswith("GNU.sparse") for key in pax):
        return "sparse file"
    if kind not in (b"0", b"\0", b"7"):
        return f"member of unknown type {kind!r}"
    if name.startswith("/") or ".." in name.split("/"):
        return "name that leaves the folder"
    return None
