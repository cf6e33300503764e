"""Runs cells as processes, several at a time, each with its own GPU or its own share of the cores."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmssl import system
from mmssl.apps.ablate.plan import AblationPlan, AblationRun
from mmssl.config import Length, dump_config
from mmssl.errors import UserError
from mmssl.files import atomic_write
from mmssl.train.checkpoint import list_checkpoints

POLL_SECONDS = 0.3
LAST_BYTES = 65_536
"""The last line of a log is looked for in so many bytes."""


@dataclass(frozen=True)
class Slot:
    """What one cell runs on while the others run."""

    cores: tuple[int, ...]
    gpu: str | None
    """As CUDA_VISIBLE_DEVICES names it."""


@dataclass(frozen=True)
class Running:
    """A cell and its process."""

    cell: AblationRun
    slot: Slot
    process: subprocess.Popen[bytes]


def visible_gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in listed.split(",") if name.strip()]
    count = torch.cuda.device_count()
    return names[:count] if names else [str(i) for i in range(count)]


def make_slots(jobs: int | None, gpus: Sequence[str], cores: Sequence[int]) -> list[Slot]:
    """Equal shares of the machine for `jobs` cells at a time (None: one a GPU, or one in all).

    Raises:
        UserError: there are fewer cores than jobs.
    """
    jobs = jobs if jobs is not None else max(1, len(gpus))
    share = len(cores) // jobs
    if share == 0:
        raise UserError(f"--jobs {jobs} needs as many cores, and there are {len(cores)}; give at most that")
    ordered = sorted(cores)
    return [
        Slot(tuple(ordered[i * share : (i + 1) * share]) if jobs > 1 else tuple(ordered), gpu)
        for i in range(jobs)
        for gpu in [gpus[i % len(gpus)] if gpus else None]
    ]


def threads_per_run(slots: Sequence[Slot], configured: int | None) -> int | None:
    """CPU threads of a cell's math where cells share the cores; None: as configured."""
    if len(slots) == 1 or slots[0].gpu is not None:
        return None
    cores = len(slots[0].cores)
    return cores if configured is None else min(cores, configured)


def run_all(plan: AblationPlan, slots: Sequence[Slot], console: Console) -> dict[str, str]:
    """Run every cell that is not finished; returns the last line of those that failed, by name.

    On KeyboardInterrupt the running cells save and stop before it is raised again; a second one kills them.
    """
    todo = [cell for cell in plan.cells if not cell.record.is_file()]
    done = len(plan.cells) - len(todo)
    if done:
        console.print(f"{done} of {len(plan.cells)} cells are finished already")
    running: list[Running] = []
    failed: dict[str, str] = {}
    with _progress(console) as bar:
        task = bar.add_task("cells", total=len(todo))
        try:
            while todo or running:
                free = [slot for slot in slots if slot not in [r.slot for r in running]]
                while free and todo:
                    running.append(_start(plan, todo.pop(0), free.pop(0)))
                    console.print(f"started  {running[-1].cell.name}", highlight=False)
                time.sleep(POLL_SECONDS)
                ended = [r for r in running if r.process.poll() is not None]
                running = [r for r in running if r not in ended]
                for r in ended:
                    _close(r)
                    _note_end(plan, r, failed, console)
                complete = len(plan.cells) - done - len(todo) - len(running)
                bar.update(task, completed=complete + sum(fraction_done(r.cell) for r in running))
        except KeyboardInterrupt:
            console.print("stopping: the running cells save first (once more Ctrl-C kills them)")
            _stop(running)
            raise
    return failed


def fraction_done(cell: AblationRun) -> float:
    """How much of its training a cell has done, 0 to 1."""
    last = _last_line(cell.run_dir / "metrics.jsonl")
    try:
        record = json.loads(last)
    except ValueError:
        return 0.0
    train = cell.config.train
    return Length(train.steps, train.minutes).fraction(record["step"], record["seconds"])


def _start(plan: AblationPlan, cell: AblationRun, slot: Slot) -> Running:
    """A process for a cell, which goes on from a checkpoint if there is one."""
    settings = plan.settings(cell)
    resume = bool(list_checkpoints(cell.run_dir / "checkpoints"))
    if cell.run_dir.exists() and not resume:
        shutil.rmtree(cell.run_dir)
    for path in (settings, plan.log(cell)):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(settings, dump_config(cell.config).encode())
    command = [sys.executable, "-m", "mmssl.apps.ablate.worker", str(settings), str(cell.record)]
    environment = dict(os.environ)
    if slot.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
    # A child starts with its parent's cores, so that every library counts them right.
    with plan.log(cell).open("ab") as log, system.restricted_to(slot.cores):
        process = subprocess.Popen(
            [*command, "--resume"] if resume else command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            # Ctrl-C is for the ablation, which then stops its runs.
            start_new_session=True,
        )
    return Running(cell, slot, process)


def _note_end(plan: AblationPlan, running: Running, failed: dict[str, str], console: Console) -> None:
    cell, code = running.cell, running.process.returncode
    if code == 0:
        console.print(f"finished {cell.name}", highlight=False)
        return
    failed[cell.name] = f"exit code {code}: {_last_line(plan.log(cell)) or 'it printed nothing'}"
    console.print(f"failed   {cell.name}: {failed[cell.name]} (all of it: {plan.log(cell)})", highlight=False)


def _stop(running: Sequence[Running]) -> None:
    try:
        for r in running:
            _close(r)
        for r in running:
            r.process.wait()
    finally:
        for r in running:
            r.process.kill()


def _close(running: Running) -> None:
    assert running.process.stdin is not None
    with suppress(BrokenPipeError):
        running.process.stdin.close()


def _last_line(path: Path) -> str:
    """The last whole line of a file that may be growing; empty without one."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LAST_BYTES))
        lines = file.read().decode("utf-8", errors="replace").rpartition("\n")[0].split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=3600,
    )
