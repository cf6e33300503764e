"""SIGTERM and SIGINT ask a run to save and stop; a later one stops it at once."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

SAME_SECONDS = 2.0
"""Signals so close together are one request: batch systems send them to every process, and launchers pass theirs on."""


class StopRequest:
    """While entered, remembers the first signal instead of dying of it."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._when = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._when = number, now
        elif now - self._when > SAME_SECONDS:
            signal.signal(number, self._previous[number])
            os.kill(os.getpid(), number)
