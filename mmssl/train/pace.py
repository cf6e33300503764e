"""Time left of a run, and why a recipe takes much longer than it says."""

import time
from collections.abc import Callable

from mmssl import system

LATE = 3.0
"""Factor over the expected time from which a run says why."""
WARM_UP = 4
"""Steps before the first estimate counts: the first ones also start workers and choose kernels."""
BUSY = 0.5
"""Cores taken by other programs from which they are named as a cause."""


def clock_text(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03 or 02:03."""
    left = round(seconds)
    hours, minutes, rest = left // 3600, left // 60 % 60, left % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class Pace:
    """Estimates the time left from the fraction done since the start of this process."""

    def __init__(
        self,
        done: float,
        expected_minutes: float | None,
        slow_precision: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        load: Callable[[], Callable[[], float]] = system.watch_load,
    ) -> None:
        """Args:
        done: fraction of the run that was done before, 0 to 1.
        expected_minutes: what the recipe says its training takes.
        slow_precision: a line on a precision that this device emulates.
        load: starts a measurement of the cores that other programs take.
        """
        self._done, self._expected, self._slow_precision = done, expected_minutes, slow_precision
        self._clock, self._start, self._others = clock, clock(), load()
        self._updates, self._told = 0, False

    def left(self, fraction: float) -> float | None:
        """Seconds to the end. None: nothing was done yet."""
        if fraction <= self._done:
            return None
        return (self._clock() - self._start) * (1 - fraction) / (fraction - self._done)

    def late(self, fraction: float) -> str | None:
        """One line, once, if the run will take over `LATE` times what its recipe says; called after each step."""
        self._updates += 1
        left = self.left(fraction)
        if self._told or self._expected is None or left is None or self._updates < WARM_UP:
            return None
        whole = left / max(1 - fraction, 1e-9) if fraction < 1 else 0.0
        if whole <= LATE * 60 * self._expected:
            return None
        self._told = True
        return (
            f"this will take about {clock_text(whole)}, where the recipe expects {self._expected:g} minutes: "
            f"{self._cause()}"
        )

    def _cause(self) -> str:
        if self._slow_precision is not None:
            return self._slow_precision
        others = self._others()
        if others >= BUSY:
            return (
                f"other programs take {others:.1f} of {system.cores()} cores; end them, or let this run wait for "
                f"them with train.threads={max(1, round(system.cores() - others))} on --resume"
            )
        return (
            f"this machine's {system.cores()} cores are slower than the recipe's; fewer steps (train.steps), smaller "
            f"images (model.vision.image_size) or a GPU make it shorter"
        )
