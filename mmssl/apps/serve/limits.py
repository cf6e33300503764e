"""Caps on a server's memory and time, and the bounded thread pools that do the slow work."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class ServerLimits:
    """Caps on the content of a request, and on the requests served at once."""

    upload_bytes: int = 10 << 20
    """Largest body of a request."""
    pixels: int = 25_000_000
    """Largest image, width times height. Decoding a PNG of this size takes up to 0.45 GB; one image is decoded at a
    time."""
    elongation: int = 20
    """Longer side over shorter side. The shorter is scaled to the model's image size, and the longer grows with it."""
    text_chars: int = 300
    """Longest text, label or prompt."""
    caption_chars: int = 1000
    """Captions and keys in answers are cut to this length."""
    labels: int = 100
    """Labels per request."""
    hits: int = 100
    """Images found per request."""
    conditions: int = 8
    """Conditions on the found images per request."""
    field_chars: int = 4000
    """Characters of the fields of a hit; those beyond are left out."""
    requests: int = 32
    """Requests served at once, including uploads that are still arriving. Further ones get status 503."""
    maps: int = 2
    """Similarity maps computed or waiting; each takes hundreds of forward passes."""
    body_seconds: float = 20.0
    """Time in which the body of a request must arrive."""
    answer_seconds: float = 60.0
    """Time for an answer once the body has arrived."""
    hosts: tuple[str, ...] = ()
    """Names of the server, beside addresses and localhost."""


class BusyError(Exception):
    """Too much work is waiting."""


class Worker:
    """A thread pool with a bounded queue, for work that would block the event loop."""

    def __init__(self, name: str, threads: int, capacity: int) -> None:
        """`capacity`: calls running or waiting."""
        self._pool = ThreadPoolExecutor(threads, name)
        self._slots = threading.BoundedSemaphore(capacity)

    async def run(self, work: Callable[[], T]) -> T:
        """Run the work on a thread and return its result. If the caller cancels, the slot is freed at once, or when the
        work finishes if it already started.

        Raises:
            BusyError: all slots are taken.
        """
        if not self._slots.acquire(blocking=False):
            raise BusyError
        future = self._pool.submit(work)
        future.add_done_callback(lambda _: self._slots.release())
        return await asyncio.wrap_future(future)
