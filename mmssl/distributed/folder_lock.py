"""A lock of a folder: one process at a time works in it, also where several hosts share the disk.

The lock is a file that names its process. On the same host, that process is looked up. On another one, the file's time
tells: the process renews it, so a file that stays old was left by a process that is gone.
"""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile

from mmssl import system
from mmssl.errors import UserError
from mmssl.files import atomic_write, remove_partial_files, set_aside

BEAT_SECONDS = 10.0
"""Interval at which a process renews its lock."""
STALE_SECONDS = 60.0
"""A lock of another host that is not renewed for this long was left behind."""
_POLL_SECONDS = 1.0
_WRITE_SECONDS = 2.0
"""Time to write a lock: an unreadable one is damaged only after it."""
_SETTLE_SECONDS = 0.2
"""Of two processes that take over one lock, the later one wins; the other finds out after this time."""


@dataclass(frozen=True)
class Holder:
    """The process that a lock names."""

    host: str
    pid: int
    machine: str
    """The host since it started, and the numbering of its processes: containers have their own."""
    started: float
    """Start of the process, in seconds since 1970."""
    since: str
    """Time of the lock."""
    token: str
    """Unique for each lock."""

    @property
    def is_here(self) -> bool:
        """True if the process can be looked up here."""
        return self.machine == system.machine()

    @property
    def is_alive(self) -> bool:
        """True if the process, looked up here, still runs."""
        found = system.process_start(self.pid)
        return found is not None and abs(found - self.started) < 2

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class FolderLock:
    """Context manager that holds the lock of a folder. The process that holds it may take it again."""

    FILE = "lock.json"

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        """`say` is called with a line when a process of another host is waited for. The folder must exist on entry."""
        self._folder, self._path, self._say = folder, folder / self.FILE, say
        pid = os.getpid()
        self._own = Holder(
            system.host(),
            pid,
            system.machine(),
            system.process_start(pid) or 0.0,
            datetime.now(UTC).isoformat(timespec="seconds"),
            secrets.token_hex(8),
        )
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock; a lock that was left behind is taken over. Partial files of killed writers are deleted.

        Raises:
            UserError: another process holds it.
            OSError: the folder cannot be written.
        """
        if self._thread is not None:
            return
        while not self._create():
            seen = self._read()
            if seen is not None and seen.is_here:
                if seen.is_alive and seen.pid != self._own.pid:
                    raise self._refusal(seen)
            elif seen is not None:
                self._watch(seen)
            elif not self._stays_unreadable():
                continue
            if self._take_over():
                break
        remove_partial_files(self._folder)
        self._thread = threading.Thread(target=self._beat, name="folder-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the lock is still held, before something is overwritten.

        Raises:
            UserError: another process took it over.
        """
        seen = self._read() if self._thread is not None else None
        if seen is not None and seen.token != self._own.token:
            raise UserError(f"{self._folder} was taken over by {seen}, as this process gave no sign of life; it stops")

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        seen = self._read()
        if seen is not None and seen.token == self._own.token:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Write the lock if there is none."""
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as file:
            file.write(self._text)
        return True

    def _take_over(self) -> bool:
        """Replace a lock that was left behind. False: another process was faster."""
        if not self._path.is_file():
            if os.path.lexists(self._path):
                set_aside(self._path)
            return False
        atomic_write(self._path, self._text)
        time.sleep(_SETTLE_SECONDS)
        seen = self._read()
        return seen is not None and seen.token == self._own.token

    @property
    def _text(self) -> bytes:
        return json.dumps(asdict(self._own)).encode()

    def _read(self) -> Holder | None:
        """The holder that the file names; None without a readable file."""
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
            found = Holder(**record)
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        kinds = (type(found.pid), type(found.started), type(found.machine), type(found.token))
        return found if kinds == (int, float, str, str) else None

    def _stays_unreadable(self) -> bool:
        """Whether the file is damaged, rather than being written or removed just now."""
        end = time.monotonic() + _WRITE_SECONDS
        while time.monotonic() < end:
            if self._read() is not None or not os.path.lexists(self._path):
                return False
            time.sleep(_POLL_SECONDS / 10)
        return True

    def _watch(self, seen: Holder) -> None:
        """Return once the lock of another host is stale.

        Raises:
            UserError: it is renewed.
        """
        first = self._time()
        if first is None:
            return
        begin, age = time.monotonic(), max(0.0, self._now() - first)
        if age < STALE_SECONDS:
            self._say(
                f"{self._folder} is in use by {seen}, or was until {age:.0f} s ago; "
                f"waiting up to {STALE_SECONDS - age:.0f} s to find out"
            )
        while age + time.monotonic() - begin < STALE_SECONDS:
            time.sleep(_POLL_SECONDS)
            if self._time() not in (first, None):
                raise self._refusal(self._read() or seen)

    def _time(self) -> float | None:
        """Time at which the lock was last renewed, by the clock of the disk's host; None without a lock."""
        try:
            return self._path.stat().st_mtime
        except OSError:
            return None

    def _now(self) -> float:
        """The time by the clock of the disk's host, which may differ from this one's."""
        with NamedTemporaryFile(dir=self._folder, prefix=".lock-") as file:
            return os.fstat(file.fileno()).st_mtime

    def _refusal(self, seen: Holder) -> UserError:
        return UserError(
            f"{self._folder} is in use by {seen}; wait until that process ends, or stop it; "
            f"two would overwrite each other's files"
        )

    def _beat(self) -> None:
        """Renew the lock until it is released."""
        while not self._stop.wait(BEAT_SECONDS):
            seen = self._read()
            try:
                if seen is not None and seen.token == self._own.token:
                    os.utime(self._path)
                elif not os.path.lexists(self._path):
                    self._create()
            except OSError:
                continue  # a disk that is away for a while
