"""Resources read from the machine."""

import os
from pathlib import Path

import psutil
import pytest

from mmssl import system
from mmssl.apps.autoconfig.inputs import this_machine

LAUNCHER = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process on a machine without a container's limits."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(system, "CONTROL_GROUP", tmp_path)


def test_the_whole_machine_without_limits() -> None:
    """Cores that this process may use, and all of the memory."""
    found = this_machine()
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.memory == psutil.virtual_memory().total
    assert (found.processes, found.machines) == (1, 1)


def test_a_containers_limits_count(tmp_path: Path) -> None:
    """A container that grants 1.5 cores counts as one core, and its memory limit as the memory."""
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert (this_machine().cores, this_machine().memory) == (1, 2**30)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert this_machine().cores == 1


def test_a_launcher_sets_processes_and_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve processes, four of them local, run on three machines."""
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = this_machine()
    assert (found.processes, found.machines) == (4, 3)
