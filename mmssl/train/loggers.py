"""Outputs of a run's metrics: files with one line per step, Accelerate's trackers, and the progress bar."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mmssl.config import Config, Length
from mmssl.files import atomic_write, read_json_lines, set_lines_aside
from mmssl.objectives import find_objective, mixing
from mmssl.train.diagnostics import Alarms
from mmssl.train.pace import Pace, clock_text
from mmssl.train.state import Record, RunState


class StepLog:
    """A file with one JSON object per step; on resuming, the lines of later steps are cut off.

    It is a log: what cannot be read in it is set aside, and never ends a run.

    Attributes:
        warning: one line about damage that was found; None without any.
    """

    def __init__(self, path: Path, first_step: int, last: Record | None = None) -> None:
        """Keep the lines up to `first_step`.

        Args:
            last: the record of `first_step`, as the checkpoint has it; it replaces one that was cut.
        """
        found = read_json_lines(path)
        known = {row["step"]: line for row, line in zip(found.rows, found.lines, strict=True) if _is_step(row)}
        kept = {step: line for step, line in known.items() if step <= first_step}
        if last is not None:
            kept.setdefault(first_step, json.dumps(last))
        damaged = found.damaged + [
            line.encode() for row, line in zip(found.rows, found.lines, strict=True) if not _is_step(row)
        ]
        self.warning = _describe_damage(path, damaged, _missing(kept, first_step) if path.exists() else [])
        # A kill at this moment must not cost the lines of all steps so far.
        atomic_write(path, "".join(f"{kept[step]}\n" for step in sorted(kept)).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush to the disk, so that no checkpoint is newer than its log after a power failure."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _is_step(row: Mapping[str, Any]) -> bool:
    """Whether a line of a log names its step."""
    return type(row.get("step")) is int and row["step"] > 0


def _missing(kept: Mapping[int, str], last: int) -> list[int]:
    """Steps without a line, of those that the log covers up to `last`."""
    return [step for step in range(min(kept, default=1), last + 1) if step not in kept]


def _describe_damage(path: Path, damaged: Sequence[bytes], missing: Sequence[int]) -> str | None:
    """Write damaged lines to a file of their own; one line about them and about steps without a line, or None."""
    parts = []
    if damaged:
        parts.append(f"{len(damaged)} lines cannot be read; they are in {set_lines_aside(path, damaged)}")
    if missing:
        parts.append(f"{len(missing)} steps have no line, from step {missing[0]} to {missing[-1]}")
    return f"{path}: {'; '.join(parts)}; the training goes on" if parts else None


def _safe(record: Mapping[str, Any]) -> Record:
    """A record whose numbers JSON can hold; others become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


class StepProgress:
    """A bar with loss, batch accuracy, samples per second, fraction of time spent waiting for data, and time left.

    On a terminal it is redrawn in place; elsewhere it prints a line every 20th of the run.
    """

    def __init__(self, console: Console, shown: bool, pace: Pace) -> None:
        self._live = shown and console.is_terminal
        self._plain = shown and not console.is_terminal
        self._console = console
        self._pace = pace
        self._lines = 0
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[eta]}"),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=1.0, step=0, numbers="", eta="")

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def update(self, record: Record, fraction: float) -> None:
        """Show a step's record; `fraction` of the run is done."""
        numbers, left = _numbers(record), self._pace.left(fraction)
        eta = "ETA --:--" if left is None else f"ETA {clock_text(left)}"
        self._bar.update(self._task, completed=fraction, step=record["step"], numbers=numbers, eta=eta)
        late = self._pace.late(fraction)
        if late is not None:
            self.say(f"warning: {late}")
        if self._plain and int(fraction * 20) >= self._lines:
            self._lines = int(fraction * 20) + 1
            self._console.print(f"step {record['step']} ({fraction:.0%}): {numbers}, {eta}", soft_wrap=True)


class RunLogger:
    """Writes each step to metrics.jsonl, Accelerate's trackers and the progress bar, on the main process only."""

    def __init__(
        self,
        config: Config,
        run: RunState,
        length: Length,
        console: Console,
        track: Callable[..., None],
        main: bool,
        slow_precision: str | None = None,
    ) -> None:
        """Args:
        track: the accelerator's `log`. Files are opened when the logger is entered.
        slow_precision: a line on a precision that this device emulates.
        """
        self._run_dir, self._run, self._length, self._track, self._main = config.run_dir, run, length, track, main
        self._names = ["metrics", *(["sample_ids"] if config.train.log_samples else [])] if main else []
        self._files: dict[str, StepLog] = {}
        done = length.fraction(run.step, run.seconds)
        self._bar = StepProgress(console, main, Pace(done, config.train.expected_minutes, slow_precision))
        self._alarms = Alarms(
            {name: find_objective(name) for name in config.objectives},
            config.data.batch_size,
            config.model.max_logit_scale,
            run.alarms,
        )
        self._stack = ExitStack()

    def __enter__(self) -> "RunLogger":
        for name in self._names:
            log = StepLog(self._run_dir / f"{name}.jsonl", self._run.step, self._run.records.get(name))
            self._files[name] = self._stack.enter_context(log)
            if log.warning is not None:
                self._bar.say(f"warning: {log.warning}")
        self._stack.enter_context(self._bar)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def log(self, step: int, record: Record, ids: Callable[[], list[int]] | None) -> None:
        """Write the record of one step, with its alarms.

        Args:
            ids: gives the sample ids of the global batch, if they are logged.
        """
        if not self._main:
            return
        fraction = self._length.fraction(step, self._run.seconds)
        alarms = self._alarms.look(record, fraction)
        for alarm in alarms:
            self._bar.say(f"warning: {alarm}")
        more = {"fraction": round(fraction, 6)} | ({"alarm": "; ".join(alarms)} if alarms else {})
        records = {"metrics": _safe({**record, **more})}
        if ids is not None:
            records["sample_ids"] = {"step": step, "ids": ids()}
        for name, entry in records.items():
            self._files[name].write(entry)
        self._run.records = records
        self._track({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=step)
        self._bar.update(record, fraction)

    def sync(self) -> None:
        """Flush the files to the disk."""
        for log in self._files.values():
            log.sync()


def _numbers(record: dict[str, Any]) -> str:
    parts = [f"loss {record['loss']:.3f}"]
    reference = mixing.find_reference(key.removesuffix(".accuracy") for key in record if key.endswith(".accuracy"))
    if reference is not None:
        parts.append(f"batch acc {record[f'{reference}.accuracy']:.1%}")
    parts.append(f"{record['samples_per_s']:.0f} samples/s")
    parts.append(f"data wait {record['data_wait']:.0%}")
    if record.get("bad_samples"):
        parts.append(f"{record['bad_samples']} bad samples")
    if record.get("skipped_updates"):
        parts.append(f"{record['skipped_updates']} skipped updates")
    return ", ".join(parts)
