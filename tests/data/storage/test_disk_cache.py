"""The cache on disk gives back what was put there or nothing, and stays below its size whoever writes to it."""

import errno
import os
import time
from pathlib import Path

import pytest

from mmssl.data.storage.disk_cache import DiskCache
from mmssl.errors import UserError

SIZE = 1000


def stored(folder: Path) -> int:
    """Bytes of all files in the cache."""
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def test_a_damaged_file_is_missing_until_it_is_put_again(tmp_path: Path) -> None:
    """A cut, a changed and an empty file give nothing, as a missing one does; names that differ in one value differ."""
    cache = DiskCache(tmp_path, 1 << 20)
    assert cache.get(("a", 1)) is None
    cache.put(("a", 1), b"content")
    cache.put(("a", 2), b"")
    assert cache.get(("a", 1)) == b"content"
    assert cache.get(("a", 2)) == b""
    assert cache.get(("a", "1")) is None
    (path,) = (path for path in tmp_path.glob("*/*") if path.stat().st_size > 4)
    for spoilt in (path.read_bytes()[:-1], b"Content" + path.read_bytes()[7:], b""):
        path.write_bytes(spoilt)
        assert cache.get(("a", 1)) is None
        assert cache.has(("a", 1))
        cache.put(("a", 1), b"content")
        assert cache.get(("a", 1)) == b"content"


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk costs one line and speed, not the run: what is kept is still read."""
    cache = DiskCache(tmp_path, 1 << 20)
    cache.put((1,), b"kept")

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mmssl.data.storage.disk_cache.atomic_write", full)
    for number in range(3):
        cache.put((2, number), b"lost")
        assert cache.get((2, number)) is None
    assert caplog.text.count(f"{tmp_path} cannot be written (No space left on device): nothing more is kept") == 1
    assert cache.get((1,)) == b"kept"


def test_several_processes_keep_a_cache_below_its_size(tmp_path: Path) -> None:
    """Each sweeps after it wrote a sixteenth of the free space or a 256th of the limit, so together they exceed the
    limit by no more than that; sweeps are rare."""
    limit = 64 << 10
    caches = [DiskCache(tmp_path, limit) for _ in range(4)]
    for number in range(1400):
        caches[number % 4].put((number,), bytes(60))
        if number % 7 == 0:
            assert stored(tmp_path) <= limit + 4 * (limit // 256 + 64)
    assert 20 < sum(cache.sweeps for cache in caches) < 400
    assert len(list(tmp_path.glob("*/*"))) > 900


def test_a_full_cache_that_stops_keeps_the_first_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says so once, keeps what it has, and exceeds its size by a 256th at most; the other kind keeps the last."""
    limit = 100 * SIZE
    first, last = DiskCache(tmp_path / "first", limit, "stop"), DiskCache(tmp_path / "last", limit)
    for number in range(300):
        first.put((number,), bytes(SIZE))
        last.put((number,), bytes(SIZE))
        os.utime(max((tmp_path / "last").glob("*/*"), key=os.path.getmtime), ns=(number, number))
    kept = [number for number in range(300) if first.has((number,))]
    assert kept == list(range(len(kept)))
    assert 95 <= len(kept) <= 101
    assert last.has((299,))
    assert not last.has((0,))
    assert caplog.text.count("is full (9.31e-05 GiB, data.cache.gib): nothing more is kept there") == 1


def test_a_full_cache_that_stops_makes_room_of_what_no_run_uses(tmp_path: Path) -> None:
    """Files that were not read for a day are removed, the least recently used first, so that new ones find room."""
    limit = 100 * SIZE
    old = DiskCache(tmp_path, limit, "stop")
    for number in range(120):
        old.put((number,), bytes(SIZE))
    past = time.time() - 2 * 24 * 3600
    for path in tmp_path.glob("*/*"):
        os.utime(path, (past, past))
    assert old.get((7,)) is not None, "a read makes it recent"
    new = DiskCache(tmp_path, limit, "stop")
    for number in range(1000, 1080):
        new.put((number,), bytes(SIZE))
    assert all(new.has((number,)) for number in (7, *range(1000, 1080)))
    assert stored(tmp_path) <= limit * (1 + 1 / 256) + SIZE


def test_a_cache_of_another_user_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readable files are used even if their time cannot be set; a folder that cannot be created is named."""
    cache = DiskCache(tmp_path, 1 << 20)
    cache.put((1,), b"content")

    def utime(path: Path) -> None:
        raise PermissionError

    (tmp_path / "file").touch()
    monkeypatch.setattr("os.utime", utime)
    assert cache.get((1,)) == b"content"
    with pytest.raises(UserError, match=r"data\.cache\.dir=.* cannot be created: Not a directory"):
        DiskCache(tmp_path / "file" / "cache", 1)
