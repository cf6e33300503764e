"""Resources that the operating system grants this process, and its rank among launched processes.

Every call that exists on some systems only is here.
"""

import ctypes
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

_MALLOC_OPTIONS = ((-3, 32 << 20), (-1, (1 << 31) - 1), (-2, 64 << 20))
"""M_MMAP_THRESHOLD at its limit, M_TRIM_THRESHOLD, M_TOP_PAD."""
CONTROL_GROUP = Path("/sys/fs/cgroup")
_NETWORK = frozenset(("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"))
"""Audit events of Python when a program reaches for the network."""
_closed = threading.local()
"""`reason`: why this thread may neither reach the network nor ask a question now."""


def rank() -> int:
    """This process among all that a launcher started, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes that a launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def allowed_cores() -> list[int]:
    """Numbers of the cores this process may run on. macOS cannot restrict a process, so all cores count there."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> int:
    """Number of whole cores this process may use. A container may grant the time of fewer than it shows."""
    count, quota = len(allowed_cores()), cpu_quota(CONTROL_GROUP)
    return count if quota is None else max(1, min(count, int(quota)))


@contextmanager
def restricted_to(numbers: Sequence[int]) -> Iterator[None]:
    """Processes started inside inherit these cores. Does nothing where the system cannot restrict a process."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, numbers)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def host() -> str:
    """Name of this computer."""
    return socket.gethostname()


def machine() -> str:
    """This computer since it started, and the numbering of its processes, which containers have of their own."""
    started = read_text(Path("/proc/sys/kernel/random/boot_id")) or str(round(psutil.boot_time()))
    numbering = Path("/proc/self/ns/pid")
    return f"{host()} {started.strip()} {numbering.readlink() if numbering.is_symlink() else ''}"


def process_start(pid: int) -> float | None:
    """Start of a process of this computer, in seconds since 1970; None if it does not run."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def stop_signals() -> list[int]:
    """Signals that ask a program to stop, of those this system has.

    Beside Ctrl-C and SIGTERM: a closed terminal (SIGHUP), and what schedulers send as a warning (SIGUSR1, SIGUSR2).
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK")
    return [int(getattr(signal, name)) for name in names if hasattr(signal, name)]


@contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[dict[int, Any]]:
    """Handle the signals to stop while the block runs; gives the handlers before. Does nothing outside the main thread.

    A SIGHUP that is ignored stays so: `nohup` asks for it.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in stop_signals():
            if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                continue
            # None: another library handles it in C.
            before[number] = signal.signal(number, handler) or signal.SIG_DFL
    try:
        yield before
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def leave(number: int) -> NoReturn:
    """End this process at once, as stopped by a signal. Nothing is waited for, flushed or cleaned up."""
    os._exit(128 + number)


def memory() -> int:
    """Bytes of main memory that this process may use, with what it uses already."""
    total, limit = int(psutil.virtual_memory().total), memory_limit(CONTROL_GROUP)
    return total if limit is None else min(total, limit)


def available_memory() -> int:
    """Bytes of main memory that are free for this process."""
    available = int(psutil.virtual_memory().available)
    limit, used = memory_limit(CONTROL_GROUP), read_text(CONTROL_GROUP / "memory.current")
    if limit is not None and used is not None:
        available = min(available, limit - int(used))
    return available


def peak_memory() -> int:
    """The most bytes of main memory this process has held.

    Linux's `getrusage` would count what the parent held when it started this process; the kernel's mark of this
    process alone does not. Windows reports the same by psutil.
    """
    status = read_text(Path("/proc/self/status"))
    if status is not None:
        mark = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(mark.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def watch_load() -> Callable[[], float]:
    """Start to watch the machine; the result gives the cores that other programs took since, on average.

    Processes that this one started are not others. Where a launcher started several here, the others are unknown: 0.
    """
    start, machine, own = time.monotonic(), _machine_seconds(), _own_seconds()

    def others() -> float:
        seconds = max(time.monotonic() - start, 1e-3)
        taken = _machine_seconds() - machine - (_own_seconds() - own)
        return max(0.0, taken / seconds) if local_world_size() == 1 else 0.0

    return others


def _machine_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))


def _own_seconds() -> float:
    """CPU seconds of this process and of those that it started and that still run."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            times = child.cpu_times()
            total += times.user + times.system
    return total


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks for the next step instead of returning them to the system.

    A training step frees and takes the same large blocks again; each return costs page faults. glibc only; elsewhere
    nothing is changed. Meanings and numbers of the options: mallopt(3) of Linux.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in _MALLOC_OPTIONS:
        mallopt(option, value)


def open_file_limit() -> int | None:
    """Soft limit of open files per process. None: the system has no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def cpu_quota(folder: Path) -> float | None:
    """Cores' worth of CPU time that a control group grants (cgroup v2's cpu.max, or v1's quota). None: no limit."""
    unified = read_text(folder / "cpu.max")
    if unified is not None:
        quota, period = unified.split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    quota_text, period_text = read_text(folder / "cpu/cpu.cfs_quota_us"), read_text(folder / "cpu/cpu.cfs_period_us")
    if quota_text is None or period_text is None or int(quota_text) < 0:
        return None
    return int(quota_text) / int(period_text)


def memory_limit(folder: Path) -> int | None:
    """Bytes of main memory that a control group grants. None: no limit."""
    text = read_text(folder / "memory.max") or read_text(folder / "memory/memory.limit_in_bytes")
    # Version 1 writes a number near 2^63 where there is no limit.
    return None if text is None or text.strip() == "max" or int(text) >= 1 << 60 else int(text)


def read_text(path: Path) -> str | None:
    """The text of a file. None: it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


@contextmanager
def without_network(reason: str) -> Iterator[None]:
    """Refuse the network and questions to the user for this thread while the block runs.

    Raises:
        PermissionError: `reason`, where code inside tries one of them.
    """
    _watch()
    before, _closed.reason = getattr(_closed, "reason", None), reason
    try:
        yield
    finally:
        _closed.reason = before


@cache
def _watch() -> None:
    """Watch the audit events of the process; once, since Python has no way to remove the hook."""
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    reason = getattr(_closed, "reason", None)
    if reason is not None and (event in _NETWORK or event == "builtins.input"):
        raise PermissionError(reason)
