"""Detection of lost processes. Without it, the other ranks may wait for them in a collective forever."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

import torch.distributed as dist

from mmssl.distributed.world import World
from mmssl.errors import UserError

BEAT_SECONDS = 2.0
"""Interval at which each process reports that it is alive."""
PATIENCE_SECONDS = 45.0
"""A process without a report for this long is lost."""
EXIT_CODE = 2

LEFT = "left"
"""The last word of a process that ended by itself."""

_BROKEN = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out|timeout|socket|remote process|nccl|gloo", re.IGNORECASE
)


@contextmanager
def peer_loss_as_user_error(world: World, remedy: str) -> Iterator[None]:
    """Replace the errors that collectives raise when another process is lost by one line.

    Raises:
        UserError: a collective failed.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        broken = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None
        )
        if world.size == 1 or not broken:
            raise
        raise UserError(
            f"another process of this run is gone (see its last lines of output); {remedy} "
            f"[{' '.join(str(error).split())[:200]}]"
        ) from error


class Heartbeat:
    """A thread that reports this process as alive and checks the reports of the others.

    If a process is silent for `PATIENCE_SECONDS`, the thread prints an error and ends this process.
    """

    def __init__(
        self,
        world: World,
        remedy: str,
        leaving: Callable[[], int | None] = lambda: None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """Watch the processes of a world.

        Args:
            leaving: the exit status with which this process must end, although it waits for others; None: it stays.
        """
        self._world, self._remedy, self._leaving, self._end = world, remedy, leaving, end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._store = dist.distributed_c10d._get_default_store() if self._on else None

    @property
    def _on(self) -> bool:
        return self._world.size > 1

    def __enter__(self) -> "Heartbeat":
        if self._on:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._on:
            return
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._beat("done")
            # The store may live in the process that ends first, so all stop reading it before any ends.
            self._world.barrier()

    def _run(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        number = 0
        while not self._stop.wait(BEAT_SECONDS):
            number += 1
            status = self._leaving()
            if status is not None:
                self._leave(status)
                return
            try:
                self._beat(str(number))
                missing = self._missing(seen)
            except (RuntimeError, OSError):
                missing = "the process that hosts the rendezvous"
            if missing is not None:
                print(
                    f"error (process {self._world.rank}): {missing} is gone; {self._remedy}",
                    file=sys.stderr,
                    flush=True,
                )
                self._end(EXIT_CODE)
                return

    def _leave(self, status: int) -> None:
        """Tell the others, and end this process."""
        with suppress(RuntimeError, OSError):
            self._beat(LEFT)
        print(
            f"error (process {self._world.rank}): stopped by a signal while the processes waited for each other; the "
            f"newest checkpoint stands; {self._remedy}",
            file=sys.stderr,
            flush=True,
        )
        self._end(status)

    def _beat(self, word: str) -> None:
        assert self._store is not None
        self._store.set(_key(self._world.rank), word)

    def _missing(self, seen: dict[int, tuple[bytes, float]]) -> str | None:
        """Description of the first process whose last report is too old."""
        assert self._store is not None
        now = time.monotonic()
        for rank in range(self._world.size):
            # `get` would block on a key that does not exist.
            word = self._store.get(_key(rank)) if self._store.check([_key(rank)]) else b""
            before, since = seen.setdefault(rank, (word, now))
            if word != before:
                seen[rank] = (word, now)
            elif word == LEFT.encode() or (word != b"done" and now - since > PATIENCE_SECONDS):
                return f"process {rank} of {self._world.size}"
        return None


def _key(rank: int) -> str:
    return f"mmssl/beat/{rank}"
