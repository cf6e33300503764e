"""A folder is used by one process at a time, and a lock that was left behind stops nobody."""

import json
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmssl import system
from mmssl.distributed import FolderLock, folder_lock
from mmssl.errors import UserError
from mmssl.files import atomic_write


@pytest.fixture
def other() -> Iterator[psutil.Process]:
    """A live process that is not this one."""
    process = subprocess.Popen(["sleep", "100"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def write(folder: Path, **changes: Any) -> None:
    """A lock of another process."""
    record = {
        "host": "elsewhere",
        "pid": os.getpid(),
        "machine": system.machine(),
        "started": 1.0,
        "since": "2026-01-01T00:00:00+00:00",
        "token": "other",
    }
    (folder / FolderLock.FILE).write_text(json.dumps({**record, **changes}))


def silent(_: str) -> None:
    """Hear nothing."""


def test_a_live_process_of_this_host_keeps_its_lock(other: psutil.Process, tmp_path: Path) -> None:
    """The second process is refused at once, in one line that names the first."""
    write(tmp_path, pid=other.pid, started=other.create_time(), host="here")
    before = (tmp_path / FolderLock.FILE).read_bytes()
    with pytest.raises(UserError, match=rf"in use by process {other.pid} on here since 2026.*two would overwrite"):
        FolderLock(tmp_path).acquire()
    assert (tmp_path / FolderLock.FILE).read_bytes() == before


def test_a_dead_process_of_this_host_does_not(other: psutil.Process, tmp_path: Path) -> None:
    """Gone, a zombie, or its number given to a process that started later: the lock is taken over at once."""
    started = other.create_time()
    write(tmp_path, pid=other.pid, started=started - 100)
    with FolderLock(tmp_path):
        pass
    other.kill()
    while other.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    write(tmp_path, pid=other.pid, started=started)
    with FolderLock(tmp_path):
        pass
    write(tmp_path, pid=2**22 + 1)
    with FolderLock(tmp_path) as lock:
        lock.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("machine", ["other boot_id pid:[1]", "", f"{system.host()} another-boot pid:[4026531836]"])
def test_a_lock_of_another_host_is_told_by_its_signs_of_life(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewed while it is watched, it is live; not renewed for a while, or old from the start, it was left behind. A
    container, or the same host before a restart, counts as another host: its numbers of processes mean nothing
    here."""
    said: list[str] = []
    write(tmp_path, machine=machine)
    old = time.time() - 2 * folder_lock.STALE_SECONDS
    os.utime(tmp_path / FolderLock.FILE, (old, old))
    with FolderLock(tmp_path, said.append):
        assert said == []
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 1.5)
    monkeypatch.setattr(folder_lock, "_POLL_SECONDS", 0.05)
    write(tmp_path, machine=machine)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.2):
            os.utime(tmp_path / FolderLock.FILE)

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(UserError, match="in use by process"):
        FolderLock(tmp_path, said.append).acquire()
    ended.set()
    thread.join()
    assert "waiting up to" in said[0]
    begin = time.monotonic()
    with FolderLock(tmp_path, said.append):
        assert time.monotonic() - begin < 10


def as_folder(path: Path) -> None:
    (path / "inner").mkdir(parents=True)


DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "NULs": lambda path: path.write_bytes(bytes(100)),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "a list": lambda path: path.write_bytes(b"[1, 2]"),
    "other entries": lambda path: path.write_bytes(b'{"pid": 1}'),
    "brackets": lambda path: path.write_bytes(b"[" * 100_000),
    "a folder": as_folder,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_lock_is_taken_over(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in the lock's place, the folder can be used, after the time that writing a lock may take."""
    monkeypatch.setattr(folder_lock, "_WRITE_SECONDS", 0.1)
    DAMAGED[damage](tmp_path / FolderLock.FILE)
    with FolderLock(tmp_path) as lock:
        lock.check()
        assert json.loads((tmp_path / FolderLock.FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / FolderLock.FILE).exists()


def test_a_lock_that_was_taken_over_stops_its_old_holder(tmp_path: Path, other: psutil.Process) -> None:
    """Before it overwrites anything, and without deleting the new lock."""
    lock = FolderLock(tmp_path)
    lock.acquire()
    write(tmp_path, pid=other.pid)
    with pytest.raises(UserError, match=f"was taken over by process {other.pid}"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / FolderLock.FILE).read_text())["token"] == "other"


def test_a_held_lock_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time moves on while it is held, also after somebody deleted it."""
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.05)
    with FolderLock(tmp_path):
        os.utime(tmp_path / FolderLock.FILE, (1, 1))
        end = time.monotonic() + 20
        while (tmp_path / FolderLock.FILE).stat().st_mtime < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert (tmp_path / FolderLock.FILE).stat().st_mtime > 2
        (tmp_path / FolderLock.FILE).unlink()
        while not (tmp_path / FolderLock.FILE).exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert (tmp_path / FolderLock.FILE).exists()


def try_to_lock(folder: Path, start: Any, found: "Queue[bool]", end: Any) -> None:
    """Take the lock at the same moment as others, and hold it until all have tried."""
    start.wait()
    try:
        lock = FolderLock(folder, silent)
        lock.acquire()
        found.put(True)
    except UserError:
        found.put(False)
    end.wait()


def test_of_many_processes_one_gets_the_lock(tmp_path: Path) -> None:
    """Six processes at the same moment: one holds it, five are refused."""
    context = multiprocessing.get_context("fork")
    start, end, found = context.Barrier(6), context.Event(), context.Queue()
    processes = [context.Process(target=try_to_lock, args=(tmp_path, start, found, end)) for _ in range(6)]
    for process in processes:
        process.start()
    results = [found.get(timeout=60) for _ in processes]
    end.set()
    for process in processes:
        process.join()
    assert sorted(results) == [False] * 5 + [True]


def test_the_next_owner_deletes_what_killed_writers_left(tmp_path: Path) -> None:
    """A writer of this computer that was killed, and one of another that wrote last a day ago, leave no partial file.
    Those of a running writer and of another computer stay, and so do names of the user's own."""
    begun = multiprocessing.get_context("fork").Event()

    def write_slowly(partial: Path) -> None:
        partial.write_text("half")
        begun.set()
        time.sleep(100)

    for name in ("killed.json", "running.json"):
        begun.clear()
        writer = multiprocessing.get_context("fork").Process(
            target=atomic_write, args=(tmp_path / name, write_slowly), daemon=True
        )
        writer.start()
        assert begun.wait(10)
        if name == "killed.json":
            writer.kill()
            writer.join()
    elsewhere, old, own = (tmp_path / f".{name}.part" for name in ("a.0a1b2c3d-1-x", "b.0a1b2c3d-1-x", "notes"))
    for path in (elsewhere, old, own):
        path.touch()
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    assert len(list(tmp_path.glob(".*.part"))) == 5
    with FolderLock(tmp_path):
        left = {path.name.split(".")[1] for path in tmp_path.glob(".*.part")}
    writer.kill()
    writer.join()
    assert left == {"running", "a", "notes"}
