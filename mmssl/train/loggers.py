"""Where a run's numbers go: step logs, Accelerate's trackers, and the progress bar."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from mmssl.files import atomic_write
from mmssl.objectives import reference

Record = dict[str, float | int | str]


class StepLog:
    """A file of one JSON object a step; on resuming, lines of steps to come are cut off."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = []
        if path.is_file():
            # A line cut by a kill has no line break and is dropped with what follows.
            whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
            kept = [line for line in whole.split("\n") if line and json.loads(line)["step"] <= first_step]
        # A kill at this moment must not cost the lines of all steps so far.
        atomic_write(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; a number that JSON cannot hold becomes null."""
        safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(safe) + "\n")
        self._file.flush()

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Remaining(ProgressColumn):
    """Time left, from the part done since the start."""

    def render(self, task: Task) -> Text:
        # A resumed run did a part of it before.
        done, before = task.completed, task.fields["before"]
        if done <= before:
            return Text("ETA --:--")
        left = int((task.elapsed or 0.0) * (1 - done) / (done - before))
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        return Text(f"ETA {hours}:{minutes:02d}:{seconds:02d}" if hours else f"ETA {minutes:02d}:{seconds:02d}")


class ProgressBar:
    """A bar with loss, accuracy in the batch, samples/s, share of time spent waiting for data, and time left.

    On a terminal it is redrawn in place; elsewhere a line is printed every 20th of the run.
    """

    def __init__(self, console: Console, shown: bool, done: float = 0.0) -> None:
        """`done`: the part of the run that was done before."""
        self._live = shown and console.is_terminal
        self._plain = shown and not console.is_terminal
        self._console = console
        self._lines = 0
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"),
            _Remaining(),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=1.0, before=done, step=0, numbers="")
        self._bar.update(self._task, completed=done)

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, soft_wrap=True, highlight=False)

    def update(self, record: Record, progress: float) -> None:
        """Show a step's record; `progress` is the part done."""
        numbers = _numbers(record)
        self._bar.update(self._task, completed=progress, step=record["step"], numbers=numbers)
        if self._plain and int(progress * 20) >= self._lines:
            self._lines = int(progress * 20) + 1
            self._console.print(f"step {record['step']} ({progress:.0%}): {numbers}", soft_wrap=True)


def _numbers(record: dict[str, Any]) -> str:
    parts = [f"loss {record['loss']:.3f}"]
    pairing = reference({key.removesuffix(".accuracy") for key in record if key.endswith(".accuracy")})
    if pairing is not None:
        parts.append(f"batch acc {record[f'{pairing}.accuracy']:.1%}")
    parts.append(f"{record['samples_per_s']:.0f} samples/s")
    parts.append(f"data wait {record['data_wait']:.0%}")
    if record.get("bad_samples"):
        parts.append(f"{record['bad_samples']} bad samples")
    if record.get("skipped_updates"):
        parts.append(f"{record['skipped_updates']} skipped updates")
    return ", ".join(parts)
