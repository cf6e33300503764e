"""Damage of whole shards: files that are no tar, and zeros or other bytes after the end of the archive."""

import string

from mmssl.data.shards.headers import BLOCK
from mmssl.data.shards.tar import Archive

_RECORD = 20 * BLOCK
"""Bytes to whose multiple tar writers pad an archive."""
_LARGE_RECORDS = tuple(1 << power for power in range(14, 21))
"""Other record sizes that a writer may have been told to use, in bytes."""
_PIECE = 1 << 20
_MOST = 64 << 20
"""Zeros that are read to find their end. More are damage, whatever follows them."""
_HEAD = 128
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gzip -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"\xfd7zXZ\x00", "xz", "xz -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
)
_UNPACK = "unpack it and pack the folder: mmssl shards pack FOLDER --out SHARDS"
_AS_FOLDER = "write its images and captions to a folder, and pack that: mmssl shards pack FOLDER --out SHARDS"
_BESIDE = "put it into a folder with its caption: mmssl shards pack FOLDER --out SHARDS"
_AS_CSV = "save it as CSV in UTF-8, and pack that: mmssl shards pack FILE.csv --out SHARDS"
_AS_PARQUET = "save it as Parquet, and pack that: mmssl shards pack FILE.parquet --out SHARDS"
_EXPORT = "export a table: sqlite3 -header -csv FILE 'select * from TABLE' > FILE.csv"
_ZIP = b"PK\x03\x04"
_FIRST_MEMBER = 30
"""Place of the name of the first member in a zip archive."""
_ZIPS = (
    ((b"[Content_Types].xml", b"_rels/", b"docProps/", b"xl/"), "an Excel workbook", _AS_CSV),
    ((b"mimetypeapplication/vnd.oasis",), "a spreadsheet", _AS_CSV),
)
"""Beginnings of the first member of zip archives that are something else."""
_OTHERS = (
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a rar archive", _UNPACK),
    (b"PAR1", "a Parquet table", "pack it: mmssl shards pack FILE.parquet --out SHARDS"),
    (b"ARROW1", "an Arrow table", _AS_PARQUET),
    (b"FEA1", "an Arrow table", _AS_PARQUET),
    (b"\xff\xff\xff\xff", "an Arrow stream", "give the folder of save_to_disk: mmssl shards pack FOLDER --out SHARDS"),
    (b"SQLite format 3\0", "a SQLite database", _EXPORT),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", _AS_CSV),
    *((bytes((0x80, version)), "a pickle, which may run code and is not read", _AS_PARQUET) for version in range(2, 6)),
    (b"\x93NUMPY", "a NumPy array", _AS_FOLDER),
    (b"\x89HDF", "an HDF5 file", _AS_FOLDER),
    (b"%PDF", "a PDF document", _AS_FOLDER),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "run: git lfs pull"),
    (b"\x89PNG", "an image", _BESIDE),
    (b"\xff\xd8\xff", "an image", _BESIDE),
)
_TEXT = {*string.printable.encode()}


def describe_foreign(archive: Archive) -> str | None:
    """A sentence that says what a file without a tar header is, with a remedy; None if that is unknown."""
    head = archive.read(0, min(_HEAD, archive.size))
    for signature, name, command in _COMPRESSED:
        if head.startswith(signature):
            return f"it is compressed with {name}; unpack it first: {command} SHARD > SHARD.tar"
    known = recognise(head)
    if known is not None:
        return "it is {}; {}".format(*known)
    if not head or not {*head} <= _TEXT:
        return None
    begin = head.decode("ascii").lstrip()
    if begin.startswith("<"):
        return f"it is a web page or XML ({_quoted(begin)}), perhaps an error message; download the shard again"
    return f"it is text ({_quoted(begin)}), perhaps an error message; download the shard again"


def recognise(head: bytes) -> tuple[str, str] | None:
    """Name and remedy of a file that is neither a tar nor text, by its first 128 bytes; None if it is unknown."""
    if head.startswith(_ZIP):
        found = (kind[1:] for kind in _ZIPS if head[_FIRST_MEMBER:].startswith(kind[0]))
        return next(found, ("a zip archive", _UNPACK))
    return next(((name, remedy) for signature, name, remedy in _OTHERS if head.startswith(signature)), None)


def describe_tail(archive: Archive, groups: int) -> str | None:
    """What is wrong behind the last member of an archive that was read to its end; None if nothing is.

    Tar writers end an archive with two blocks of zeros and pad it to a multiple of 10,240 bytes. More zeros were not
    written by them: a download or copy that reserved the space and stopped leaves such a file.

    Args:
        groups: number of samples up to the end, from which the number of lost ones is estimated.
    """
    position = archive.end
    piece = archive.read(position, _PIECE)
    if not piece:
        return "it has no end marker: it was probably cut between two members; compare its size with the original's"
    while piece and not piece.strip(b"\0") and position - archive.end < _MOST:
        position += len(piece)
        piece = archive.read(position, _PIECE)
    zeros = position - archive.end + len(piece) - len(piece.lstrip(b"\0"))
    rest = archive.size - archive.end
    if piece and zeros <= _RECORD + BLOCK:
        return (
            f"the {rest} bytes after its end marker are not used{_estimate(archive, groups, rest)}; if archives were "
            "joined with cat, pack them into shards: mmssl shards pack FOLDER --out SHARDS"
        )
    if groups == 0 and archive.end == 0 and not piece.strip(b"\0"):
        return "it holds only zeros: an empty archive, or a download that never began; download or pack it again"
    if piece or not _is_padding(zeros, position):
        return (
            f"from byte {archive.end} on it holds zeros ({zeros} bytes or more), which no tar writer adds: the last "
            f"{rest} bytes are not used{_estimate(archive, groups, rest)}; it was not completely written: download or "
            "copy it again"
        )
    return None


def _is_padding(zeros: int, size: int) -> bool:
    """True if a writer may have ended an archive of `size` bytes with so many zeros."""
    return zeros <= _RECORD + BLOCK or any(size % record == 0 and zeros <= record + BLOCK for record in _LARGE_RECORDS)


def _estimate(archive: Archive, groups: int, rest: int) -> str:
    """The number of samples in the rest of an archive, if they are as large as those before."""
    return f" (about {max(1, round(groups * rest / archive.end)):,} samples)" if groups > 0 else ""


def _quoted(text: str) -> str:
    return repr(" ".join(text.split())[:40])
