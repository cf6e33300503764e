"""Speed of training beside busy programs, relative to the speed alone."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmssl import system
from mmssl.errors import UserError

WARM_UP = 3
"""Steps at the start that are left out: they start workers and choose kernels."""
NEIGHBOUR = "while True: pass"


@dataclass(frozen=True)
class BusySpeed:
    """Samples per second of each round, alone and beside the neighbours."""

    neighbours: int
    alone: list[float]
    beside: list[float]

    @property
    def ratio(self) -> float:
        """Speed beside the neighbours, relative to the speed alone; median of the rounds' ratios."""
        return statistics.median(b / a for a, b in zip(self.alone, self.beside, strict=True))

    def text(self) -> str:
        """One line per round, and the ratio."""
        lines = [
            f"round {n}: alone {a:.0f} samples/s, beside {self.neighbours} busy processes {b:.0f} samples/s"
            for n, (a, b) in enumerate(zip(self.alone, self.beside, strict=True), 1)
        ]
        fair = max(0.0, 1 - self.neighbours / (2 * system.cores()))
        return "\n".join(
            [*lines, f"ratio {self.ratio:.2f} on {system.cores()} cores (a fair share would be {fair:.2f})"]
        )


def bench_busy(config: str, overrides: Sequence[str], steps: int, rounds: int, neighbours: int) -> BusySpeed:
    """Train for a few steps alone and beside busy processes, in turn, each run in a process of its own."""
    found = BusySpeed(neighbours, [], [])
    for _ in range(rounds):
        found.alone.append(_speed(config, overrides, steps))
        with _busy(neighbours):
            found.beside.append(_speed(config, overrides, steps))
    return found


def _speed(config: str, overrides: Sequence[str], steps: int) -> float:
    """Median samples per second of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        changes = [*overrides, f"train.steps={steps + WARM_UP}", "evaluate.suites={}", f"run_dir={run}"]
        command = [sys.executable, "-m", "mmssl", "train", config, *changes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"the run failed: {done.stderr.strip().splitlines()[-1]}")
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[WARM_UP:]
    return statistics.median(json.loads(line)["samples_per_s"] for line in lines)


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """Processes that take a core each."""
    running = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()
