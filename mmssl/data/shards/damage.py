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
_HEAD = 64
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gzip -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"\xfd7zXZ\x00", "xz", "xz -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
)
_OTHERS = (
    (b"PK\x03\x04", "a zip archive", "unpack it and pack the folder: mmssl shards pack FOLDER --out SHARDS"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and pack the folder: mmssl shards pack FOLDER --out SHARDS"),
    (b"Rar!", "a rar archive", "unpack it and pack the folder: mmssl shards pack FOLDER --out SHARDS"),
    (b"PAR1", "a Parquet table", "pack it: mmssl shards pack FILE.parquet --out SHARDS"),
    (b"ARROW1", "an Arrow table", "save it as Parquet and pack that: mmssl shards pack FILE.parquet --out SHARDS"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "run: git lfs pull"),
    (b"\x89PNG", "an image", "put it into a folder with its caption: mmssl shards pack FOLDER --out SHARDS"),
    (b"\xff\xd8\xff", "an image", "put it into a folder with its caption: mmssl shards pack FOLDER --out SHARDS"),
    (b"\x89HDF", "an HDF5 file", "write its images and captions to a folder, and pack that"),
)
_TEXT = {*string.printable.encode()}


def describe_foreign(archive: Archive) -> str | None:
    """A sentence that says what a file without a tar header is, with a remedy; None if that is unknown."""
    head = archive.read(0, min(_HEAD, archive.size))
    for signature, name, command in _COMPRESSED:
        if head.startswith(signature):
            return f"it is compressed with {name}; unpack it first: {command} SHARD > SHARD.tar"
    for signature, name, remedy in _OTHERS:
        if head.startswith(signature):
            return f"it is {name}; {remedy}"
    if not head or not {*head} <= _TEXT:
        return None
    begin = head.decode("ascii").lstrip()
    if begin.startswith("<"):
        return f"it is a web page or XML ({_quoted(begin)}), perhaps an error message; download the shard again"
    return f"it is text ({_quoted(begin)}), perhaps an error message; download the shard again"


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
