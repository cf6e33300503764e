"""Pieces of remote shards kept on a local disk."""

import hashlib
import logging
import os
import zlib
from contextlib import suppress
from pathlib import Path

from mmssl.data.shards.shard_index import ShardIndex
from mmssl.errors import UserError
from mmssl.files import atomic_write

CHUNK = 1 << 20
"""Bytes of a piece; the last one of a shard may be shorter."""
_CHECKSUM_BYTES = 4
_log = logging.getLogger(__name__)


class DiskCache:
    """Chunks of remote shards as files of a folder, those used longest ago removed above a size. For many
    processes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises UserError when the folder cannot be made."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._room = 0
        self._warned = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir={folder} cannot be made: {error.strerror}; name another folder") from None

    def get(self, shard: ShardIndex, number: int) -> bytes | None:
        """A chunk, if it is here whole and unharmed."""
        path = self._path(shard, number)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        chunk, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        if len(chunk) != min(CHUNK, shard.bytes - number * CHUNK) or checksum != _checksum(chunk):
            return None
        with suppress(OSError):  # a file of another user's
            os.utime(path)
        return chunk

    def put(self, shard: ShardIndex, number: int, chunk: bytes) -> None:
        """Keep a chunk."""
        path = self._path(shard, number)
        try:
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, chunk + _checksum(chunk))
        except OSError as error:
            if not self._warned:
                _log.warning("%s cannot keep a chunk of %s: %s", self._folder, shard.shard, error.strerror)
            self._warned = True
            return
        self._room -= len(chunk) + _CHECKSUM_BYTES
        if self._room < 0:
            self._room = self.sweep()

    def sweep(self) -> int:
        """Remove the files used longest ago if all together are too large. Returns the bytes that may be written before
        the next look: a sixteenth of what is free, for others write too."""
        files = []
        for path in self._folder.glob("*/*"):
            with suppress(OSError):  # another process removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        kept = sum(size for _, size, _ in files)
        if kept > self._max_bytes:
            # Some room beyond, so that looks are few: they take a second where there are 100,000 files.
            for _, size, path in sorted(files):
                if kept <= 0.95 * self._max_bytes:
                    break
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                    kept -= size
        return max(self._max_bytes // 256, (self._max_bytes - kept) // 16)

    def _path(self, shard: ShardIndex, number: int) -> Path:
        # The index tells one content of a URL from another.
        words = repr((shard.shard, shard.bytes, shard.checksum, number)).encode()
        name = hashlib.blake2b(words, digest_size=16).hexdigest()
        return self._folder / name[:2] / name


def _checksum(chunk: bytes) -> bytes:
    return zlib.crc32(chunk).to_bytes(_CHECKSUM_BYTES, "little")
