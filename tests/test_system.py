"""What the operating system tells."""

import psutil
import pytest

from mmssl import system


class Times:
    """CPU seconds, as psutil reports them."""

    def __init__(self, user: float, system: float, nice: float = 0.0) -> None:
        self.user, self.system, self.nice = user, system, nice


def test_the_load_of_others_is_the_machine_without_this_process_and_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In 10 s the machine computed 18 s, this process 4 s and its child 5 s: others took 0.9 of a core."""
    now = {"time": 100.0, "machine": 50.0, "own": 1.0, "child": 0.5}

    class Child:
        def cpu_times(self) -> Times:
            return Times(now["child"], 0.0)

    class Process:
        def children(self, recursive: bool) -> list[Child]:
            return [Child()]

    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(now["machine"] - 20, 15.0, 5.0))
    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(system.time, "monotonic", lambda: now["time"])
    monkeypatch.setattr(system.time, "process_time", lambda: now["own"])
    others = system.watch_load()
    now.update(time=110.0, machine=68.0, own=5.0, child=5.5)
    assert others() == pytest.approx(0.9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert others() == 0.0
