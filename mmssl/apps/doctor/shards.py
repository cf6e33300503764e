"""Checks of shards: read speed, latency, and index."""

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from mmssl.apps.doctor.checks import Finding
from mmssl.data import expand
from mmssl.data.shards import FOLDER_FILE, SampleLimits, is_remote, offsets_path
from mmssl.data.storage import Fetcher, RetryPolicy, find_remote_indexes
from mmssl.errors import UserError
from mmssl.files import open_regular

SAMPLED = 4
"""Number of shards to check, evenly spread."""
READ_BYTES = 16 << 20
"""Bytes to read of each shard."""
SLOW_BYTES_PER_S = 50e6
"""Below this, one GPU waits for images: 500 of 100 kB per second."""
SLOW_SECONDS = 0.25
"""Latency of a remote shard above which reading is slow."""
_BLOCK = 1 << 20


def examine_shards(patterns: Sequence[str]) -> list[Finding]:
    """Check some of the shards. Nothing is written."""
    try:
        shards = expand(patterns)
    except UserError as error:
        return [Finding("shards", "error", str(error), "correct the path, or check that the disk is mounted")]
    local, remote = [s for s in shards if not is_remote(s)], [s for s in shards if is_remote(s)]
    findings = [*_examine_local(local)] if local else []
    return findings + ([*_examine_remote(remote)] if remote else [])


def _examine_local(shards: Sequence[str]) -> list[Finding]:
    chosen = spread(shards)
    try:
        count, seconds = read(chosen)
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
        return [Finding("shards", "error", found, "check that the file is complete and readable")]
    missing = [shard for shard in shards if not has_index(shard)]
    return [check_read_speed(len(shards), count, seconds), check_index(len(shards), missing, writable(missing))]


def _examine_remote(shards: Sequence[str]) -> list[Finding]:
    chosen = spread(shards)
    fetcher = Fetcher(RetryPolicy(tries=2, stall_seconds=10.0))
    try:
        seconds = [latency(fetcher, shard) for shard in chosen]
        missing = [
            s for s, i in zip(chosen, find_remote_indexes(chosen, SampleLimits(), fetcher), strict=True) if i is None
        ]
    except UserError as error:
        return [Finding("remote shards", "error", str(error), "check address, access and network")]
    return [check_latency(len(shards), statistics.median(seconds)), check_remote_index(len(chosen), missing)]


def spread(shards: Sequence[str]) -> list[str]:
    """Choose up to SAMPLED shards, evenly spread."""
    count = min(SAMPLED, len(shards))
    return [shards[i * len(shards) // count] for i in range(count)]


def read(shards: Sequence[str]) -> tuple[int, float]:
    """Read up to READ_BYTES of each file, bypassing the page cache where the system allows it.

    Returns:
        Bytes read, and seconds taken.

    Raises:
        OSError: a file cannot be read.
    """
    count, seconds = 0, 0.0
    for shard in shards:
        with open_regular(shard) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, READ_BYTES, os.POSIX_FADV_DONTNEED)
            start, end = time.perf_counter(), count + READ_BYTES
            while count < end and (piece := file.read(_BLOCK)):
                count += len(piece)
            seconds += time.perf_counter() - start
    return count, seconds


def latency(fetcher: Fetcher, shard: str) -> float:
    """Seconds until the server of a remote file responds.

    Raises:
        UserError: it does not respond.
    """
    start = time.perf_counter()
    fetcher.size(shard)
    return time.perf_counter() - start


def has_index(shard: str) -> bool:
    """True if a local shard has its index."""
    return offsets_path(shard).is_file() and (Path(shard).parent / FOLDER_FILE).is_file()


def writable(shards: Sequence[str]) -> bool:
    """True if the folders of all shards are writable, so that an index can be stored."""
    return all(os.access(Path(shard).parent, os.W_OK) for shard in shards)


def check_read_speed(shards: int, count: int, seconds: float) -> Finding:
    """Assess the read speed of local shards: `count` bytes in `seconds`."""
    speed = count / max(seconds, 1e-9)
    found = f"{shards:,} local, read at {speed / 1e6:,.0f} MB/s ({count / 1e6:,.0f} MB)"
    if speed >= SLOW_BYTES_PER_S:
        return Finding("shards", "ok", found)
    remedy = "copy them to a local disk, or set data.slice_mib=8 to read more in a row"
    return Finding("shards", "warning", found, remedy)


def check_index(shards: int, missing: Sequence[str], can_write: bool) -> Finding:
    """Assess local shards without an index."""
    if not missing:
        return Finding("index", "ok", f"present for all {shards:,} shards")
    found = f"missing for {len(missing):,} of {shards:,} shards, first {missing[0]}"
    if can_write:
        return Finding("index", "ok", found, "the first training creates it; mmssl shards index creates it now")
    remedy = "make the folder writable once and run mmssl shards index, or every start reads all headers again"
    return Finding("index", "warning", f"{found}; the folder cannot be written", remedy)


def check_latency(shards: int, seconds: float) -> Finding:
    """Assess the latency of remote shards."""
    found = f"{shards:,}, the first byte after {1e3 * seconds:,.0f} ms"
    if seconds <= SLOW_SECONDS:
        return Finding("remote shards", "ok", found)
    remedy = "set data.cache.dir to keep a local copy, and more data.workers; or copy the shards closer"
    return Finding("remote shards", "warning", found, remedy)


def check_remote_index(checked: int, missing: Sequence[str]) -> Finding:
    """Assess remote shards without an index, among those checked."""
    if not missing:
        return Finding("remote index", "ok", f"present for the {checked:,} shards checked")
    found = f"missing for {len(missing):,} of the {checked:,} shards checked, first {missing[0]}"
    remedy = "mmssl shards index PATTERN; without it a run reads shards sequentially and cannot resume exactly"
    return Finding("remote index", "warning", found, remedy)
