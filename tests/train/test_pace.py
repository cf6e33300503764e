"""The time left, and the line of a run that takes much longer than its recipe says."""

from collections.abc import Callable

import pytest

from mmssl.train.pace import WARM_UP, Pace, clock_text


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def pace(clock: Clock, minutes: float | None, slow: str | None = None, others: float = 0.0, done: float = 0.0) -> Pace:
    def load() -> Callable[[], float]:
        return lambda: others

    return Pace(done, minutes, slow, clock, load)


def test_the_time_left_counts_from_where_this_process_began() -> None:
    """A run resumed at 50 % that did 10 % in 60 s has 240 s left for 40 %; before any step: nothing."""
    clock = Clock()
    one = pace(clock, None, done=0.5)
    assert one.left(0.5) is None
    clock.now = 60.0
    assert one.left(0.6) == pytest.approx(240.0)
    assert (clock_text(240.0), clock_text(3723.9)) == ("04:00", "1:02:04")


@pytest.mark.parametrize(
    ("slow", "others", "words"),
    [
        ("bf16 is emulated", 1.0, ["bf16 is emulated"]),
        (None, 1.2, ["other programs take 1.2", "train.threads="]),
        (None, 0.1, ["slower", "train.steps"]),
    ],
)
def test_a_late_run_says_why_once(slow: str | None, others: float, words: list[str]) -> None:
    """100 minutes where 10 are expected: one line, after the warm-up, with the cause that is known."""
    clock = Clock()
    one = pace(clock, 10.0, slow, others)
    lines = []
    for step in range(1, 10):
        clock.now = 60.0 * step
        lines.append(one.late(step / 100))
    told = [line for line in lines if line is not None]
    assert lines.index(told[0]) == WARM_UP - 1
    assert len(told) == 1
    assert "1:40:00" in told[0]
    assert "10 minutes" in told[0]
    assert all(word in told[0] for word in words)


@pytest.mark.parametrize("minutes", [None, 40.0])
def test_a_run_within_three_times_its_time_says_nothing(minutes: float | None) -> None:
    """100 minutes where 40 are expected, or nothing is: silence."""
    clock = Clock()
    one = pace(clock, minutes)
    for step in range(1, 10):
        clock.now = 60.0 * step
        assert one.late(step / 100) is None
