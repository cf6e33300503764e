"""Where each sample of a shard stands: built from the tar headers alone, kept beside the shards.

`NAME.tar.idx` holds N + 1 little-endian uint64: where each sample's first header stands, then the end of the
last sample (the layout Megatron-Energon writes). `mmssl-index.json`, one a folder, holds counts, sizes and
what is left out.
"""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.data.grouping import Group, Limits, groups
from mmssl.data.tar import Archive, ReadAt, TarError
from mmssl.types import UserError

FOLDER_FILE = "mmssl-index.json"
_VERSION = 1
_WINDOW = 16 << 10
_TAIL = 1 << 20
"""How far the bytes after the end marker are looked at."""
_log = logging.getLogger(__name__)

Offsets = NDArray[np.uint64]
Progress = Callable[[int, int], None]
"""Called as `progress(shards done, shards)`."""


@dataclass(frozen=True)
class LeftOut:
    """A sample that is never read, and why."""

    ordinal: int
    """Its place in the shard, counting every group."""
    key: str
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """What is known of one shard without reading its samples."""

    shard: str
    bytes: int
    """Size of the file."""
    mtime_ns: int
    """Time of its last change."""
    groups: int
    """Samples, unusable ones included."""
    left_out: tuple[LeftOut, ...]
    problems: tuple[str, ...]
    """What is wrong with the shard as a whole, for example that it is cut."""
    checksum: str
    """BLAKE2b-128 of the offsets' bytes."""
    max_member_bytes: int
    """The limit it was made under."""
    offsets: Offsets | None = None
    """[groups + 1], when they are not kept in a file."""

    @property
    def samples(self) -> int:
        """Usable samples."""
        return self.groups - len(self.left_out)

    def ranges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First byte and end of each usable sample, int64 [samples] each."""
        offsets = self.offsets if self.offsets is not None else _read_offsets(self)
        if offsets is None:
            offsets = index_shard(self.shard, Limits(self.max_member_bytes)).offsets
            assert offsets is not None
            if _checksum(offsets) != self.checksum:
                raise UserError(f"shard {self.shard} changed while it was in use; start again with --resume")
        bounds = offsets.astype(np.int64)
        keep = np.ones(self.groups, dtype=bool)
        keep[[out.ordinal for out in self.left_out]] = False
        return bounds[:-1][keep], bounds[1:][keep]


def index_shards(
    shards: Sequence[str], limits: Limits, *, processes: int = 0, progress: Progress | None = None
) -> list[ShardIndex]:
    """The index of local shards, from the files beside them where those still fit, else made anew and
    written.

    A folder that cannot be written is no error: the index then lives in memory. `processes` > 0 reads the
    headers in that many processes, else in threads.
    """
    kept = {folder: _read_folder(folder) for folder in {Path(shard).parent for shard in shards}}
    done = {shard: index for shard in shards if (index := _still_fits(shard, kept, limits)) is not None}
    missing = [shard for shard in shards if shard not in done]
    for number, index in enumerate(_index_all(missing, limits, processes), start=len(done) + 1):
        done[index.shard] = index
        if progress is not None:
            progress(number, len(shards))
    if missing:
        made = [done[shard] for shard in missing]
        for folder in {Path(shard).parent for shard in missing}:
            for index in _write(folder, [i for i in made if Path(i.shard).parent == folder], kept[folder]):
                done[index.shard] = index
    return [done[shard] for shard in shards]


def index_shard(shard: str, limits: Limits) -> ShardIndex:
    """The index of one local shard, read from its headers."""
    try:
        with Path(shard).open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            found: list[Group] = []
            problems = list(_collect(Archive(windowed(file.fileno()), status.st_size), limits, found))
    except OSError as error:
        raise UserError(f"shard {shard} cannot be read: {error.strerror}") from None
    end = found[-1].end if found else 0
    offsets = np.array([*(group.start for group in found), end], dtype="<u8")
    left_out = (LeftOut(i, g.key, g.defect) for i, g in enumerate(found) if g.defect is not None)
    return ShardIndex(
        shard=shard,
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        groups=len(found),
        left_out=tuple(left_out),
        problems=tuple(problems),
        checksum=_checksum(offsets),
        max_member_bytes=limits.max_member_bytes,
        offsets=offsets,
    )


def fingerprint(indexes: Sequence[ShardIndex]) -> str:
    """BLAKE2b-64 of the shards' names, sizes, offsets and exclusions, wherever the folder stands."""
    digest = hashlib.blake2b(digest_size=8)
    for index in indexes:
        left_out = [out.ordinal for out in index.left_out]
        digest.update(repr((Path(index.shard).name, index.bytes, index.checksum, left_out)).encode())
    return digest.hexdigest()


def report(indexes: Sequence[ShardIndex]) -> str | None:
    """One line that counts and names what was left out of the shards, or None when all is well."""
    lost = [f"{index.shard}: {out.key!r} ({out.reason})" for index in indexes for out in index.left_out]
    wrong = [f"{index.shard}: {problem}" for index in indexes for problem in index.problems]
    if not lost and not wrong:
        return None
    first = "; ".join([*wrong, *lost][:3]) + ("; ..." if len(lost) + len(wrong) > 3 else "")
    return f"{len(lost)} unusable samples left out, {len(wrong)} damaged shards: {first}"


def _collect(archive: Archive, limits: Limits, found: list[Group]) -> Iterator[str]:
    """Append every group to `found`; yield the shard's own problems."""
    if archive.size == 0:
        yield "the file is empty"
        return
    try:
        for group in groups(archive, limits):
            found.append(group)
    except TarError as error:
        yield f"{error}; the {archive.size - error.offset} bytes from there on are not used"
        return
    if archive.end >= archive.size:
        yield "it has no end marker: it was probably cut between two members"
    elif archive.read(archive.end, _TAIL).strip(b"\0"):
        yield f"the {archive.size - archive.end} bytes after its end marker are not used"


def windowed(file: int) -> ReadAt:
    """Positioned reads that fetch a window at a time, for neighbouring headers of small members."""
    window, begin = b"", 0

    def read(offset: int, count: int) -> bytes:
        nonlocal window, begin
        if not begin <= offset <= offset + count <= begin + len(window):
            window, begin = os.pread(file, max(count, _WINDOW), offset), offset
        return window[offset - begin : offset - begin + count]

    return read


def _checksum(offsets: Offsets) -> str:
    return hashlib.blake2b(offsets.astype("<u8").tobytes(), digest_size=16).hexdigest()


def _offsets_path(shard: str) -> Path:
    return Path(f"{shard}.idx")


def _read_offsets(index: ShardIndex) -> Offsets | None:
    """The file of offsets, None when it is gone or not the one that was indexed."""
    try:
        offsets: Offsets = np.fromfile(_offsets_path(index.shard), dtype="<u8")
    except OSError:
        return None
    return offsets if len(offsets) == index.groups + 1 and _checksum(offsets) == index.checksum else None


def _read_folder(folder: Path) -> dict[str, Any]:
    """The folder's entries by file name; none when there is no file or it is damaged."""
    try:
        tree = json.loads((folder / FOLDER_FILE).read_text(encoding="utf-8"))
        return dict(tree["shards"]) if tree["version"] == _VERSION else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _still_fits(shard: str, kept: Mapping[Path, dict[str, Any]], limits: Limits) -> ShardIndex | None:
    """The kept index of a shard if the file has not changed since and its offsets are there."""
    path = Path(shard)
    entry = kept[path.parent].get(path.name)
    try:
        status = path.stat()
        index = None if entry is None else _from_json(shard, entry)
        size = _offsets_path(shard).stat().st_size
    except (OSError, TypeError, ValueError, KeyError):
        return None
    if index is None or size != 8 * (index.groups + 1):
        return None
    key = (index.bytes, index.mtime_ns, index.max_member_bytes)
    return index if key == (status.st_size, status.st_mtime_ns, limits.max_member_bytes) else None


def _to_json(index: ShardIndex) -> dict[str, Any]:
    return {
        "bytes": index.bytes,
        "mtime_ns": index.mtime_ns,
        "samples": index.samples,
        "groups": index.groups,
        "checksum": index.checksum,
        "max_member_bytes": index.max_member_bytes,
        "left_out": [[out.ordinal, out.key, out.reason] for out in index.left_out],
        "problems": list(index.problems),
    }


def _from_json(shard: str, entry: Mapping[str, Any]) -> ShardIndex:
    left_out = tuple(LeftOut(int(i), str(key), str(reason)) for i, key, reason in entry["left_out"])
    if any(not 0 <= out.ordinal < int(entry["groups"]) for out in left_out):
        raise ValueError(f"the index of {shard} is damaged")
    return ShardIndex(
        shard=shard,
        bytes=int(entry["bytes"]),
        mtime_ns=int(entry["mtime_ns"]),
        groups=int(entry["groups"]),
        left_out=left_out,
        problems=tuple(map(str, entry["problems"])),
        checksum=str(entry["checksum"]),
        max_member_bytes=int(entry["max_member_bytes"]),
    )


def _index_all(shards: Sequence[str], limits: Limits, processes: int) -> Iterator[ShardIndex]:
    if len(shards) < 2:
        yield from (index_shard(shard, limits) for shard in shards)
        return
    pool: Executor
    if processes > 0:
        pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    else:
        # Threads hide the latency of network file systems.
        pool = ThreadPoolExecutor(8, thread_name_prefix="mmssl-index")
    with pool:
        yield from pool.map(index_shard, shards, itertools.repeat(limits))


def _write(folder: Path, made: Sequence[ShardIndex], kept: dict[str, Any]) -> list[ShardIndex]:
    """Write the offsets and the folder's file; the indexes, without the offsets that are now in a file."""
    written = []
    try:
        for index in made:
            assert index.offsets is not None
            _replace(_offsets_path(index.shard), index.offsets.astype("<u8").tobytes())
            written.append(replace(index, offsets=None))
        entries = kept | {Path(index.shard).name: _to_json(index) for index in made}
        entries = {name: entries[name] for name in sorted(entries) if (folder / name).exists()}
        text = json.dumps({"version": _VERSION, "shards": entries}, indent=1)
        _replace(folder / FOLDER_FILE, text.encode())
    except OSError as error:
        _log.info("%s cannot be written (%s): its index is kept in memory", folder, error.strerror)
        return []
    return written


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old or the new one, never a part."""
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            temporary.chmod(0o644)
            temporary.replace(path)
        except OSError:
            temporary.unlink()
            raise
