"""`--rewind`: after a run stopped at data it could not learn from, go back to before it and on past it.

SIGTERM and SIGINT ask a run to save and stop; a later one stops it at once.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from mmssl.errors import UserError
from mmssl.files import atomic_write
from mmssl.train import checkpoint

_NOTE = "rewound.json"


@dataclass(frozen=True)
class BadStep:
    """A step whose loss or gradient was not finite."""

    step: int
    keys: list[str]
    """`shard:key` of this process's samples."""


def write_bad_steps(run_dir: Path, rank: int, steps: Sequence[BadStep]) -> Path:
    """Keep what a run stopped at."""
    path = run_dir / f"nonfinite-step-{steps[-1].step}-rank-{rank}.json"
    record = [{"step": bad.step, "keys": bad.keys} for bad in steps]
    atomic_write(path, json.dumps({"steps": record}, indent=1).encode())
    return path


def rewind(run_dir: Path) -> str:
    """Make the run go on from its last good checkpoint before the bad data, and past that data, when it is resumed.

    Later checkpoints are deleted. One process calls it, before any restores.

    Returns: a line for the user.

    Raises:
        UserError: there is nothing to rewind, the run went on past it, or there is no checkpoint to go back to.
    """
    notes = sorted(run_dir.glob("nonfinite-step-*-rank-0.json"), key=lambda path: path.stat().st_mtime)
    if not notes:
        raise UserError(f"{run_dir} did not stop at bad data (no nonfinite-step-*.json); use --resume alone")
    steps = [int(bad["step"]) for bad in json.loads(notes[-1].read_text(encoding="utf-8"))["steps"]]
    first, last = steps[0], steps[-1]
    folder = run_dir / "checkpoints"
    past = [path.name for path in checkpoint.list_checkpoints(folder) if checkpoint.step_of(path) > last]
    if past:
        raise UserError(
            f"{run_dir} went on past the bad data of steps {first} to {last} ({past[-1]} is there, and would be "
            f"deleted); use --resume alone"
        )
    found = checkpoint.newest_checkpoint(folder, before=first)
    if found is None:
        raise UserError(
            f"{folder} has no checkpoint from before step {first}, where the bad data begins; start anew with "
            f"another seed, and with train.checkpoint_steps"
        )
    path, _ = found
    step = checkpoint.step_of(path)
    batches = last - step + batches_past(run_dir, step)
    atomic_write(run_dir / _NOTE, json.dumps({"step": step, "batches": batches}).encode())
    checkpoint.delete_checkpoints(p for p in checkpoint.list_checkpoints(folder) if checkpoint.step_of(p) > step)
    for note in run_dir.glob(f"nonfinite-step-{last}-rank-*.json"):
        note.rename(note.with_name(note.name.replace("nonfinite", "rewound")))
    return f"rewound to {path}; the batches of steps {step + 1} to {last} are left out"


def batches_past(run_dir: Path, step: int) -> int:
    """Batches to leave out when the checkpoint of `step` is restored."""
    note = run_dir / _NOTE
    if not note.is_file():
        return 0
    record = json.loads(note.read_text(encoding="utf-8"))
    return int(record["batches"]) if record["step"] == step else 0


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
