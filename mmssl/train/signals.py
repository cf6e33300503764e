"""SIGTERM and SIGINT ask a run to save and stop; a second one stops it at once."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, remembers the first signal instead of dying of it."""

    def __init__(self) -> None:
        self.signal: int | None = None
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
        self.signal = number
        for known, handler in self._previous.items():
            signal.signal(known, handler)
