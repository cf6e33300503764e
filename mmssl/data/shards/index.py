"""The index of local shards: the offset of each sample, read from the tar headers and stored beside the shards.

`NAME.tar.idx` holds N + 1 little-endian uint64: the offset of each sample's first header, then the end of the last
sample (the layout of Megatron-Energon). `mmssl-index.json`, one per folder, holds counts, sizes and excluded samples.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mmssl.data.shards.members import USUAL_MEMBERS, MemberNames, SampleLimits
from mmssl.data.shards.shard_index import RULES, LeftOut, ShardIndex, index_shard, offsets_path
from mmssl.data.shards.urls import is_remote
from mmssl.files import atomic_write

FOLDER_FILE = "mmssl-index.json"
_VERSION = 1
_TOGETHER = 256
"""Indexes written at a time, so that an interruption loses little work."""
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called as `progress(shards done, shards)`."""


def index_shards(
    shards: Sequence[str], limits: SampleLimits, *, processes: int = 0, progress: Progress | None = None
) -> list[ShardIndex]:
    """The index of local shards. It is read from the files beside them if they are up to date, else made and written.

    If the folder is read-only, the index stays in memory. `processes` > 0 reads the headers in that many processes,
    0 in threads.
    """
    done = dict(_written(shards, limits))
    missing = [shard for shard in shards if shard not in done]
    kept = {folder: _read_folder(folder) for folder in {Path(shard).parent for shard in missing}}
    made: list[ShardIndex] = []
    try:
        for number, index in enumerate(_index_all(missing, limits, processes), start=len(done) + 1):
            made.append(index)
            if progress is not None:
                progress(number, len(shards))
            if len(made) == _TOGETHER:
                done.update((index.shard, index) for index in _write_all(made, kept))
                made = []
    finally:
        # Also what was made before an interruption.
        done.update((index.shard, index) for index in _write_all(made, kept))
    return [done[shard] for shard in shards]


def fingerprint(indexes: Sequence[ShardIndex]) -> str:
    """BLAKE2b-64 of the names, sizes, offsets and excluded samples of shards, independent of their folder."""
    digest = hashlib.blake2b(digest_size=8)
    for index in indexes:
        left_out = [out.ordinal for out in index.left_out]
        # Without the token of a signed URL.
        name = index.shard.partition("?")[0] if is_remote(index.shard) else index.shard
        digest.update(repr((Path(name).name, index.bytes, index.checksum, left_out)).encode())
    return digest.hexdigest()


def _written(shards: Sequence[str], limits: SampleLimits) -> Iterator[tuple[str, ShardIndex]]:
    """The shards with an index beside them that still fits. One folder's file is in memory at a time: parsed, it takes
    four times as much as its indexes."""
    folders: dict[Path, list[str]] = {}
    for shard in shards:
        folders.setdefault(Path(shard).parent, []).append(shard)
    for folder, names in folders.items():
        entries = _read_folder(folder)
        found = ((shard, _still_fits(shard, entries, limits)) for shard in names)
        yield from ((shard, index) for shard, index in found if index is not None)


def _read_folder(folder: Path) -> dict[str, Any]:
    """The folder's entries by file name; empty if the file is missing or damaged."""
    try:
        tree = json.loads((folder / FOLDER_FILE).read_text(encoding="utf-8"))
        return dict(tree["shards"]) if tree["version"] == _VERSION else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _still_fits(shard: str, entries: Mapping[str, Any], limits: SampleLimits) -> ShardIndex | None:
    """The stored index of a shard if the shard has not changed since and its offsets exist."""
    path = Path(shard)
    entry = entries.get(path.name)
    try:
        status = path.stat()
        index = None if entry is None else index_from_json(shard, entry)
        size = offsets_path(shard).stat().st_size
    except (OSError, TypeError, ValueError, KeyError):
        return None
    if index is None or size != 8 * (index.groups + 1):
        return None
    key = (index.bytes, index.mtime_ns, index.rules, index.limits)
    return index if key == (status.st_size, status.st_mtime_ns, RULES, limits) else None


def index_to_json(index: ShardIndex) -> dict[str, Any]:
    """The entry of a shard in its folder's file."""
    entry = {
        "bytes": index.bytes,
        "mtime_ns": index.mtime_ns,
        "samples": index.samples,
        "groups": index.groups,
        "checksum": index.checksum,
        "max_member_bytes": index.max_member_bytes,
        "rules": index.rules,
        "members": asdict(index.members),
        **({} if index.images else {"images": False}),
        "left_out": [[out.ordinal, out.key, out.reason] for out in index.left_out],
        "problems": list(index.problems),
    }
    return {**entry, "entry_checksum": _entry_checksum(entry)}


def index_from_json(shard: str, entry: Mapping[str, Any]) -> ShardIndex:
    """Parse an entry of a folder's file. Raises ValueError, TypeError or KeyError if it is damaged."""
    left_out = tuple(LeftOut(i, str(key), str(reason)) for i, key, reason in entry["left_out"])
    counts = {name: entry[name] for name in ("bytes", "samples", "groups", "max_member_bytes")}
    ordinals = [out.ordinal for out in left_out]
    numbers = [*counts.values(), *ordinals]
    # Except the time: a file may be older than 1970.
    if any(type(n) is not int for n in (*numbers, entry["mtime_ns"])) or min(numbers) < 0:
        raise ValueError(f"the index of {shard} has a count that is no whole number of at least 0")
    if len(set(ordinals)) < len(ordinals) or any(ordinal >= counts["groups"] for ordinal in ordinals):
        raise ValueError(f"the index of {shard} leaves out samples that it does not have")
    # Indexes of version 0.1.0 have no checksum of the entry.
    known = entry.get("entry_checksum")
    body = {name: value for name, value in entry.items() if name != "entry_checksum"}
    if counts["samples"] != counts["groups"] - len(left_out) or known not in (None, _entry_checksum(body)):
        raise ValueError(f"the index of {shard} does not match its checksum")
    return ShardIndex(
        shard=shard,
        bytes=counts["bytes"],
        mtime_ns=entry["mtime_ns"],
        groups=counts["groups"],
        left_out=left_out,
        problems=tuple(map(str, entry["problems"])),
        checksum=str(entry["checksum"]),
        max_member_bytes=counts["max_member_bytes"],
        rules=int(entry.get("rules", 1)),
        members=_shared(MemberNames.of(**entry.get("members", {}))),
        images=bool(entry.get("images", True)),
    )


def _shared(members: MemberNames) -> MemberNames:
    """The usual names as one object for all shards."""
    return USUAL_MEMBERS if members == USUAL_MEMBERS else members


def _entry_checksum(entry: Mapping[str, Any]) -> str:
    """BLAKE2b-64 of an entry, which decides what a run reads."""
    return hashlib.blake2b(json.dumps(entry, sort_keys=True).encode(), digest_size=8).hexdigest()


def _index_all(shards: Sequence[str], limits: SampleLimits, processes: int) -> Iterator[ShardIndex]:
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


def _write_all(made: Sequence[ShardIndex], kept: Mapping[Path, dict[str, Any]]) -> Iterator[ShardIndex]:
    """Write indexes to their folders. Written ones are returned without their offsets."""
    folders: dict[Path, list[ShardIndex]] = {}
    for index in made:
        folders.setdefault(Path(index.shard).parent, []).append(index)
    for folder, indexes in folders.items():
        try:
            _write(folder, indexes, kept[folder])
        except OSError as error:
            _log.info("%s cannot be written (%s): its index is kept in memory", folder, error.strerror)
            yield from indexes
        else:
            yield from (replace(index, offsets=None) for index in indexes)


def _write(folder: Path, made: Sequence[ShardIndex], kept: dict[str, Any]) -> None:
    """Write the offsets and update the folder's file."""
    # A file that is no tar gets no files of ours beside it.
    made = [index for index in made if index.groups or not index.problems]
    if not made:
        return
    for index in made:
        assert index.offsets is not None
        atomic_write(offsets_path(index.shard), index.offsets.astype("<u8").tobytes())
    kept.update((Path(index.shard).name, index_to_json(index)) for index in made)
    entries = {name: kept[name] for name in sorted(kept) if (folder / name).exists()}
    atomic_write(folder / FOLDER_FILE, folder_json(entries))


def folder_json(entries: Mapping[str, Any]) -> bytes:
    """The content of a folder's file; `entries` by shard name."""
    return json.dumps({"version": _VERSION, "shards": entries}, indent=1).encode()
