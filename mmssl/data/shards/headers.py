"""The headers of a tar: their fields, and the long names and pax records that stand before them.

Tar readers differ on unusual headers: GNU tar, libarchive and Python's tarfile then find other names, other bytes or
other members. What they read differently is refused here, so that a shard holds the same samples for every program.
"""

import re
from functools import lru_cache
from zlib import adler32

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
"""Longer names and pax records count as damage."""
GLOBAL = b"g"
_PAX = (b"x", b"X")
_LONG_NAME = b"L"
EXTENSIONS = (_LONG_NAME, b"K", *_PAX, GLOBAL)
"""Kinds of blocks that describe the member behind them."""
_UNUSED_NUMBERS = ((100, 124, 8), (136, 148, 12), (329, 345, 8))
"""Begin, end and width of mode, owner and group, of the time, and of the device. Python's tarfile takes a header for
the end if one of them is no number."""
_BASE_256 = (0x80, 0xFF)
"""First bytes of a number that is no octal text: positive and negative."""
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_DISPUTED = ("SCHILY.realsize", "SUN.holesdata")
"""Records by which some readers fill the holes of a sparse file."""


class TarError(ValueError):
    """The archive cannot be read further."""

    def __init__(self, message: str, offset: int, name: str | None = None, reason: str = "is cut") -> None:
        """
        Args:
            name: the member at which reading ends, if known.
            reason: what is wrong with this member.
        """
        super().__init__(f"{message} at byte {offset}")
        self.offset = offset
        self.name = name
        self.reason = reason


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


class Extensions:
    """Long names and pax records before one header."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the member, in place of the header's."""
        self.size: int | None = None
        """Size of the member in bytes, in place of the header's."""
        self.refused: str | None = None
        """Reason to refuse the member, or None."""
        self.disputed: str | None = None
        """Reason why readers differ on where the member ends, or None."""
        self._kinds: list[bytes] = []

    def add(self, kind: bytes, content: bytes, position: int) -> None:
        """Add the content of the block of this kind whose header is at `position`.

        Raises:
            TarError: the content is damaged.
        """
        before = self._kinds
        if before and (kind == GLOBAL or kind in before or kind in _PAX or before[0] in _PAX):
            self.disputed = "headers that tar readers combine differently"
        if kind == GLOBAL:
            _check_global(pax_records(content, position), position)
            return
        before.append(kind)
        if kind == _LONG_NAME:
            self._set_name(content.partition(b"\0")[0])
        elif kind in _PAX:
            self._add_records(pax_records(content, position), position)

    def _add_records(self, records: list[tuple[str, bytes]], position: int) -> None:
        keys = [key for key, _ in records]
        if any(key.startswith("GNU.") for key in keys):
            self.disputed = "sparse file"
        if keys.count("size") > 1:
            raise TarError("damaged pax header", position)
        if keys.count("path") > 1 or any(key in _DISPUTED for key in keys):
            self.refused = self.refused or "pax records that tar readers understand differently"
        for key, value in records:
            if key == "path":
                self._set_name(value)
            elif key == "size":
                self.size = _decimal(value, position)
            elif key == "hdrcharset" and value not in (b"BINARY", b"ISO-IR 10646 2000 UTF-8"):
                raise TarError("damaged pax header", position)

    def _set_name(self, name: bytes) -> None:
        if not name or b"\0" in name:
            self.refused = self.refused or "a name that is empty or holds zero bytes"
        self.name = text_of(name)


def _check_global(records: list[tuple[str, bytes]], position: int) -> None:
    """Refuse records about all further members that change their names or bytes."""
    for key, _ in records:
        if key in ("path", "size", "linkpath", "hdrcharset", *_DISPUTED) or key.startswith("GNU."):
            raise TarError(f"a global pax header with {key!r}, which tar readers understand differently", position)


def check_block(block: bytes, position: int) -> None:
    """Raises TarError if a header's checksum, kind or a number in it is wrong."""
    stored = _octal(block[148:156], position)
    total = _sum(block) - _sum(block[148:156]) + 256
    # Some old writers summed signed characters.
    if stored != total and stored != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise TarError("damaged header", position)
    if block[156] != 0 and not block[156:157].isalnum():
        raise TarError("damaged header", position)
    for begin, end, width in _UNUSED_NUMBERS:
        if not _are_numbers(block[begin:end], width):
            raise TarError("damaged header", position)


def _sum(block: bytes) -> int:
    """The sum of a header's bytes. Adler-32 sums bytes and begins at 1; 256 bytes stay below its modulus."""
    return (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2


def size_of(block: bytes, position: int) -> int:
    """The size that a header names, in bytes: octal digits, or GNU's base-256 for larger numbers."""
    field = block[124:136]
    if field[0] == _BASE_256[0]:
        return int.from_bytes(field[1:], "big")
    return _octal(field, position)


def name_of(block: bytes) -> tuple[str, str | None]:
    """The name in a header, and the reason to refuse it or None."""
    name, is_ustar = text_of(block[:100]), block[257:263] == b"ustar\0"
    # Elsewhere GNU tar and libarchive keep times and sizes there, and Python's tarfile joins it to the name.
    if not is_ustar and any(block[345:500]):
        return name, "a name that tar readers understand differently"
    prefix = text_of(block[345:500]) if block[345] else ""
    return f"{prefix}/{name}" if prefix else name, None


def text_of(field: bytes) -> str:
    """The text of a field, up to its first zero byte."""
    return field.partition(b"\0")[0].decode("utf-8", errors="backslashreplace")


def pax_records(content: bytes, position: int) -> list[tuple[str, bytes]]:
    """Records of the form `LENGTH key=value\\n`, where LENGTH counts the whole record."""
    records = []
    begin = 0
    while begin < len(content):
        digits = content[begin : begin + 20].partition(b" ")[0]
        end = begin + _decimal(digits, position)
        key, equals, value = content[begin + len(digits) + 1 : end].partition(b"=")
        if not key or not equals or b"\0" in key or end > len(content) or value[-1:] != b"\n":
            raise TarError("damaged pax header", position)
        records.append((key.decode("utf-8", errors="backslashreplace"), value[:-1]))
        begin = end
    return records


def _octal(field: bytes, position: int) -> int:
    found = _OCTAL.fullmatch(field)
    if found is None:
        raise TarError("damaged header", position)
    return int(found[1] or b"0", 8)


@lru_cache(4096)  # owners, modes and times are the same in most headers of a tar
def _are_numbers(fields: bytes, width: int) -> bool:
    """True if each field of this width is a number."""
    starts = range(0, len(fields), width)
    return all(fields[start] in _BASE_256 or _OCTAL.fullmatch(fields[start : start + width]) for start in starts)


def _decimal(text: bytes, position: int) -> int:
    if not (text.isdigit() and len(text) < 20):
        raise TarError("damaged pax header", position)
    return int(text)
