"""Text files of unknown encoding: their encoding, and their lines."""

import bz2
import codecs
import gzip
import lzma
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, cast

from charset_normalizer import from_bytes

from mmssl.errors import UserError, one_line

MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks; that of UTF-32 begins with that of UTF-16."""
_LEGACY = (*(f"cp125{n}" for n in (2, 0, 1, 3, 4, 5, 6, 7, 8)), "cp874", "cp932", "euc_jp", "gb18030", "big5", "cp949")
"""Encodings besides Unicode in which spreadsheets and old programs write tables."""
_NAMES = {"utf-8-sig": "utf-8", "cp932": "shift-jis", "cp949": "euc-kr"}
_TIE = 0.01
"""Difference of charset-normalizer's `chaos` below which two encodings are equally likely."""
_CHUNK = 1 << 20
_SAMPLE = 1 << 14
"""Bytes of lines beyond ASCII from which an encoding is recognised."""
_ESCAPES = ("\udc80", "\udcff")
"""Characters that stand for bytes which are not of the encoding (PEP 383)."""


def open_binary(path: Path) -> BinaryIO:
    """Open a file, decompressed if its name ends in .gz, .bz2 or .xz."""
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(BinaryIO, openers.get(path.suffix.lower(), open)(path, "rb"))


def find_encoding(path: Path, given: str | None) -> str:
    """The encoding of a text file: the given one, or what its bytes tell.

    Bytes with a few errors in otherwise valid UTF-8 are UTF-8: the errors are damage.

    Raises:
        UserError: the given encoding is unknown, or the file cannot be read.
    """
    if given is not None:
        try:
            return codecs.lookup(given).name
        except LookupError:
            raise UserError(f"encoding {given!r} is unknown; give one of Python's, such as utf-8 or cp1252") from None
    try:
        with open_binary(path) as file:
            return _detect(file)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def read_lines(path: Path, encoding: str) -> Iterator[str]:
    """Lines of a text file with their ends; \\n, \\r\\n and \\r each end a line.

    Bytes that are not of the encoding become the characters that `is_damaged` finds.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with TextIOWrapper(open_binary(path), encoding, errors="surrogateescape", newline="") as file:
            yield from file
    except (OSError, EOFError, lzma.LZMAError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def is_damaged(line: str) -> bool:
    """True if a line holds bytes that are not of its encoding."""
    return not line.isascii() and _count_escapes(line) > 0


def display_name(encoding: str) -> str:
    """The usual name of an encoding, such as windows-1252 for cp1252."""
    name = codecs.lookup(encoding).name
    number = name.removeprefix("cp")
    return f"windows-{number}" if name.startswith("cp125") else _NAMES.get(name, name)


def _detect(file: BinaryIO) -> str:
    head = file.read(_CHUNK)
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head[:_SAMPLE] and (wide := _utf_16(head[:_SAMPLE])) is not None:
        return wide
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    valid, damaged, sample = 0, 0, bytearray()
    while head:
        if not head.isascii():
            text = decoder.decode(head)
            escaped = _count_escapes(text)
            valid += len(head) - len(text)  # the bytes of a character behind its first
            damaged += escaped
            sample += b"".join(_beyond_ascii(head, _SAMPLE - len(sample)))
        head = file.read(_CHUNK)
    return "utf-8" if valid >= damaged else _legacy(bytes(sample))


def _count_escapes(text: str) -> int:
    try:
        text.encode()
    except UnicodeEncodeError:
        return sum(_ESCAPES[0] <= character <= _ESCAPES[1] for character in text)
    return 0


def _utf_16(head: bytes) -> str | None:
    """UTF-16 without a mark: nearly all zeros of a western text stand on one side of each unit."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) < len(head) // 8:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _beyond_ascii(content: bytes, limit: int) -> Iterator[bytes]:
    """Lines with bytes above 127, up to a total size."""
    for line in content.splitlines(keepends=True):
        if limit <= 0:
            return
        if not line.isascii():
            limit -= len(line)
            yield line


def _legacy(sample: bytes) -> str:
    """The likeliest encoding besides Unicode. Among equally likely ones windows-1252, the most common."""
    matches = from_bytes(sample, cp_isolation=list(_LEGACY), enable_fallback=False)
    best = matches.best()
    western = next((match for match in matches if "cp1252" in match.could_be_from_charset), None)
    if best is None or (western is not None and western.chaos <= best.chaos + _TIE):
        return "cp1252"
    return best.encoding
