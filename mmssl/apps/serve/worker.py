"""Work that would hold up the event loop, on threads of its own, with an end to how much of it may wait."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class BusyError(Exception):
    """As much work waits as may."""


class Worker:
    """A few threads and the work that waits for them."""

    def __init__(self, name: str, threads: int, most: int) -> None:
        """`most`: calls in hand or waiting."""
        self._pool = ThreadPoolExecutor(threads, name)
        self._places = threading.BoundedSemaphore(most)

    async def run(self, work: Callable[[], T]) -> T:
        """What the work returns or raises. Who waits no longer gives up its place, unless the work has begun: then the
        place is free when it ends.

        Raises:
            BusyError: there is no place.
        """
        if not self._places.acquire(blocking=False):
            raise BusyError
        future = self._pool.submit(work)
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)
