"""A folder of checked files on a local disk that many processes share, below a size."""

import hashlib
import logging
import os
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Literal

from mmssl.errors import UserError
from mmssl.files import atomic_write

Name = tuple[object, ...]
"""What a file is known by: plain values that change whenever its content would."""

_CHECKSUM_BYTES = 4
_UNUSED_SECONDS = 24 * 3600.0
"""A file that no run read for this long may be removed from a cache that keeps the first ones."""
_log = logging.getLogger(__name__)


class DiskCache:
    """A folder of files. Above a size, the least recently used ones are removed, or no more are added."""

    def __init__(self, folder: Path, max_bytes: int, full: Literal["remove", "stop"] = "remove") -> None:
        """
        Args:
            full: `remove` makes room by removing the least recently used files. `stop` adds no more: where all files
                are read in turn, as in an epoch, the least recently used one is always the next that is needed.

        Raises:
            UserError: the folder cannot be created.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._full = full
        self._free_bytes = 0
        self._stopped = False
        self.sweeps = 0
        """Times the folder was listed to see its size."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"data.cache.dir={folder} cannot be created: {error.strerror}; choose another folder"
            raise UserError(message) from None

    def has(self, name: Name) -> bool:
        """True if a file is there. It may be damaged."""
        return self._path(name).exists()

    def get(self, name: Name) -> bytes | None:
        """The content of a file, or None if it is missing or damaged."""
        path = self._path(name)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        content, checksum = stored[:-_CHECKSUM_BYTES], stored[-_CHECKSUM_BYTES:]
        if checksum != _checksum(content):
            return None
        with suppress(OSError):  # the file belongs to another user
            os.utime(path)
        return content

    def put(self, name: Name, content: bytes) -> None:
        """Store a file, unless the folder is full or was found unwritable, of which one line is logged."""
        if self._stopped:
            return
        path = self._path(name)
        try:
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, content + _checksum(content))
        except OSError as error:
            self._stop(f"cannot be written ({error.strerror})")
            return
        self._free_bytes -= len(content) + _CHECKSUM_BYTES
        if self._free_bytes < 0:
            self._free_bytes = self.sweep()

    def sweep(self) -> int:
        """Make room if the folder is too large. Returns the bytes that may be written before the next sweep: a
        sixteenth of the free space, because other processes write too."""
        self.sweeps += 1
        files = _files(self._folder)
        kept = sum(size for _, size, _ in files)
        if kept > self._max_bytes:
            kept = self._make_room(files, kept)
        if kept > self._max_bytes:
            self._stop(f"is full ({self._max_bytes / 2**30:.3g} GiB, data.cache.gib)")
        return max(self._max_bytes // 256, (self._max_bytes - kept) // 16)

    def _make_room(self, files: list[tuple[int, int, str]], kept: int) -> int:
        """Remove files that may go, the least recently used first. Returns the bytes that are left."""
        newest = time.time_ns() - int(_UNUSED_SECONDS * 1e9)
        # 5 % below the limit, so that sweeps are rare: one takes a second with 100,000 files.
        for used, size, path in sorted(files):
            if kept <= 0.95 * self._max_bytes or (self._full == "stop" and used > newest):
                break
            with suppress(OSError):
                os.unlink(path)  # noqa: PTH108 - a name, not a path
                kept -= size
        return kept

    def _stop(self, reason: str) -> None:
        if not self._stopped:
            _log.warning("the cache %s %s: nothing more is kept there", self._folder, reason)
        self._stopped = True

    def _path(self, name: Name) -> Path:
        digest = hashlib.blake2b(repr(name).encode(), digest_size=16).hexdigest()
        return self._folder / digest[:2] / digest


def _files(folder: Path) -> list[tuple[int, int, str]]:
    """Time of the last use, size and path of each file in the folders of a folder."""
    found = []
    for part in (entry.path for entry in os.scandir(folder) if entry.is_dir()):
        with os.scandir(part) as entries:
            for entry in entries:
                with suppress(OSError):  # another process removed it
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
    return found


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little")
