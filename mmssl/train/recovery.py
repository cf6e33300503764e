"""Stopping and resuming: non-finite updates, `--rewind` past bad batches, and signals.

A signal to stop makes a run save and stop; a later one stops it at once.
"""

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from mmssl import system
from mmssl.config import Config
from mmssl.errors import StopRequested, UserError
from mmssl.files import atomic_write
from mmssl.train import checkpoint
from mmssl.train.state import RunState

_NOTE = "rewound.json"
SCALE_STEPS = 16
"""Further updates in a row that may be skipped under fp16: the gradient scale starts at 2 ** 16, and each overflow
halves it."""


@dataclass(frozen=True)
class BadStep:
    """A step whose loss or gradient was not finite."""

    step: int
    keys: list[str]
    """`shard:key` of this process's samples."""


class NonFiniteGuard:
    """Counts skipped updates and stops the run after too many in a row."""

    def __init__(self, config: Config, run: RunState, rank: int, scaled: bool) -> None:
        """`scaled`: a gradient scaler is in use (fp16)."""
        self._run_dir, self._run, self._rank = config.run_dir, run, rank
        self._limit = config.train.nonfinite_limit + (SCALE_STEPS if scaled else 0)
        self._bad: list[BadStep] = []

    def count(self, step: int, keys: list[str], finite: bool) -> None:
        """Count one step; `keys` names this process's samples."""
        self._run.skipped += not finite
        self._run.skipped_in_row = 0 if finite else self._run.skipped_in_row + 1
        self._bad = [] if finite else [*self._bad, BadStep(step, keys)]

    def check(self) -> None:
        """Stop the run if too many updates in a row were skipped.

        Raises:
            UserError: names the file with the samples of these steps.
        """
        if self._run.skipped_in_row < self._limit:
            return
        path = write_bad_steps(self._run_dir, self._rank, self._bad)
        raise UserError(
            f"the loss or gradient was not finite at {self._run.skipped_in_row} steps in a row up to "
            f"{self._bad[-1].step}; their samples are named in {path}; skip them with --resume RUN --rewind, or "
            f"lower optim.lr or use train.precision=bf16 and --resume from the last checkpoint"
        )


def write_bad_steps(run_dir: Path, rank: int, steps: Sequence[BadStep]) -> Path:
    """Write the steps at which a run stopped, with their samples."""
    path = run_dir / f"nonfinite-step-{steps[-1].step}-rank-{rank}.json"
    record = [{"step": bad.step, "keys": bad.keys} for bad in steps]
    atomic_write(path, json.dumps({"steps": record}, indent=1).encode())
    return path


def rewind(run_dir: Path) -> str:
    """Prepare a run to resume from its last checkpoint before the bad batches and to skip them.

    Deletes later checkpoints. One process calls it, before any process restores.

    Returns: a line for the user.

    Raises:
        UserError: the run did not stop at bad data, continued past it, or has no earlier checkpoint.
    """
    notes = sorted(run_dir.glob("nonfinite-step-*-rank-0.json"), key=lambda path: path.stat().st_mtime)
    if not notes:
        raise UserError(f"{run_dir} did not stop at bad data (no nonfinite-step-*.json); use --resume alone")
    steps = _bad_steps(notes[-1])
    first, last = steps[0], steps[-1]
    folder = run_dir / "checkpoints"
    past = [path.name for path in checkpoint.list_checkpoints(folder) if checkpoint.step_of(path) > last]
    if past:
        raise UserError(
            f"{run_dir} continued past the bad data of steps {first} to {last} ({past[-1]} exists and would be "
            f"deleted); use --resume alone"
        )
    found = checkpoint.newest_checkpoint(folder, before=first)
    if found is None:
        raise UserError(
            f"{folder} has no checkpoint before step {first}, where the bad data begins; start a new run with "
            f"another seed, and with train.checkpoint_steps"
        )
    path, _ = found
    step = checkpoint.step_of(path)
    try:
        batches = last - step + batches_past(run_dir, step)
    except ValueError as error:
        raise UserError(f"{error}, so the batches to skip are unknown; use --resume alone") from None
    atomic_write(run_dir / _NOTE, json.dumps({"step": step, "batches": batches}).encode())
    checkpoint.delete_checkpoints(p for p in checkpoint.list_checkpoints(folder) if checkpoint.step_of(p) > step)
    for note in run_dir.glob(f"nonfinite-step-{last}-rank-*.json"):
        note.rename(note.with_name(note.name.replace("nonfinite", "rewound")))
    return f"rewound to {path}; the batches of steps {step + 1} to {last} are skipped"


def _bad_steps(note: Path) -> list[int]:
    """The steps of a note of bad data, at least one.

    Raises:
        UserError: the note is damaged.
    """
    try:
        steps = [int(bad["step"]) for bad in json.loads(note.read_text(encoding="utf-8"))["steps"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        steps = []
    if not steps:
        raise UserError(f"{note} is damaged, so the bad batches are unknown; use --resume alone")
    return steps


def batches_past(run_dir: Path, step: int) -> int:
    """Number of batches to skip when the checkpoint of `step` is restored.

    Raises:
        ValueError: the note about them is damaged.
    """
    note = run_dir / _NOTE
    if not note.is_file():
        return 0
    try:
        record = json.loads(note.read_text(encoding="utf-8"))
        rewound, batches = record["step"], record["batches"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        rewound, batches = None, None
    if type(rewound) is not int or type(batches) is not int or batches < 0:
        raise ValueError(f"{note} is damaged")
    return batches if rewound == step else 0


SAME_SECONDS = 2.0
"""Signals closer together than this, in seconds, are one request: batch systems send them to every process, and
launchers forward theirs."""
STALL_SECONDS = 5.0
"""A process that waits for data or evaluates for this long after a signal is stalled."""


class StopRequest:
    """Context manager that records the first signal instead of ending the process.

    A later signal does what it did before: it ends the process.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._when = 0.0
        self._since: float | None = None
        self._raises = False
        self._previous: dict[int, Any] = {}
        self._stack = ExitStack()

    @property
    def requested(self) -> bool:
        """True once a signal has arrived."""
        return self.signal is not None

    @property
    def stalled(self) -> bool:
        """True if this process has been waiting for long since the signal."""
        since = self._since
        return self.requested and since is not None and time.monotonic() - max(since, self._when) > STALL_SECONDS

    @contextmanager
    def waiting(self, raises: bool = True) -> Iterator[None]:
        """Mark a wait during which nothing is lost: a signal ends it at once, also one that arrived before.

        Args:
            raises: False: other processes wait for this one in the same place, so the signal does not end the wait.

        Raises:
            StopRequested: a signal has arrived.
        """
        self._since, self._raises = time.monotonic(), raises
        try:
            if raises and self.signal is not None:
                raise StopRequested(self.signal)
            yield
        finally:
            self._since, self._raises = None, False

    def __enter__(self) -> "StopRequest":
        self._previous = self._stack.enter_context(system.on_stop_signals(self._remember))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._when = number, now
        elif now - self._when > SAME_SECONDS:
            self._end(number)
        if self._raises:
            self._raises = False
            raise StopRequested(number)

    def _end(self, number: int) -> None:
        previous = self._previous[number]
        if previous not in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler):
            # The command line's own, for which this signal would be the first.
            system.leave(number)
        signal.signal(number, previous)
        os.kill(os.getpid(), number)
