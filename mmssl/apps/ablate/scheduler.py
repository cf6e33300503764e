"""Runs of an ablation as processes, several at a time, each with its own GPU or its own cores."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mmssl import system
from mmssl.apps.ablate.plan import AblationPlan, AblationRun
from mmssl.config import dump_config
from mmssl.distributed import FolderLock
from mmssl.errors import UserError
from mmssl.files import atomic_write
from mmssl.train import list_checkpoints

POLL_SECONDS = 0.3
STOP_SECONDS = 6.0
"""Time to wait for runs that save after a signal."""
LAST_BYTES = 65_536
"""Bytes at the end of a log that are searched for its last line."""


@dataclass(frozen=True)
class Slot:
    """The part of the machine that one run uses."""

    cores: tuple[int, ...]
    gpu: str | None
    """Name for CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True)
class Running:
    """A run and its process."""

    run: AblationRun
    slot: Slot
    process: subprocess.Popen[bytes]


def visible_gpus() -> list[str]:
    """Names of the usable GPUs, as in CUDA_VISIBLE_DEVICES."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in listed.split(",") if name.strip()]
    count = torch.cuda.device_count()
    return names[:count] if names else [str(i) for i in range(count)]


def make_slots(jobs: int | None, gpus: Sequence[str], cores: Sequence[int]) -> list[Slot]:
    """Divide the machine equally among `jobs` simultaneous runs; None: one per GPU, or one without GPUs.

    Raises:
        UserError: there are fewer cores than jobs.
    """
    jobs = jobs if jobs is not None else max(1, len(gpus))
    share = len(cores) // jobs
    if share == 0:
        raise UserError(
            f"--jobs {jobs} needs one core per job, but there are {len(cores)}; give at most --jobs {len(cores)}"
        )
    ordered = sorted(cores)
    return [
        Slot(tuple(ordered[i * share : (i + 1) * share]) if jobs > 1 else tuple(ordered), gpu)
        for i in range(jobs)
        for gpu in [gpus[i % len(gpus)] if gpus else None]
    ]


def threads_per_run(slots: Sequence[Slot], configured: int | None) -> int | None:
    """CPU threads of each run's math if runs share the cores; None: as configured."""
    if len(slots) == 1 or slots[0].gpu is not None:
        return None
    cores = len(slots[0].cores)
    return cores if configured is None else min(cores, configured)


def run_all(
    plan: AblationPlan,
    slots: Sequence[Slot],
    log: Callable[[str], None],
    progress: Callable[[float, float], None],
) -> dict[str, str]:
    """Run everything that is not finished; returns the last line of failed runs, by name.

    On KeyboardInterrupt the running processes save and stop, for which it waits a while before it is raised again; a
    second one kills them.

    Args:
        log: called with a line when a run starts and when it ends.
        progress: called with the number of runs done, fractions included, and their total.
    """
    with FolderLock(plan.out, log):
        return _run_all(plan, slots, log, progress)


def _run_all(
    plan: AblationPlan,
    slots: Sequence[Slot],
    log: Callable[[str], None],
    progress: Callable[[float, float], None],
) -> dict[str, str]:
    todo = [run for run in plan.runs if not run.is_finished]
    total = len(todo)
    if total < len(plan.runs):
        log(f"{len(plan.runs) - total} of {len(plan.runs)} runs are finished already")
    running: list[Running] = []
    failed: dict[str, str] = {}
    try:
        while todo or running:
            free = [slot for slot in slots if slot not in [r.slot for r in running]]
            while free and todo:
                running.append(_start(plan, todo.pop(0), free.pop(0)))
                log(f"started  {running[-1].run.name}")
            time.sleep(POLL_SECONDS)
            ended = [r for r in running if r.process.poll() is not None]
            running = [r for r in running if r not in ended]
            for r in ended:
                _close(r)
                log(_outcome(plan, r, failed))
            progress(total - len(todo) - len(running) + sum(fraction_done(r.run) for r in running), total)
    except KeyboardInterrupt:
        log("stopping: the running processes save first (press Ctrl-C again to kill them)")
        left = _stop(running)
        if left:
            log(f"{left} runs still save; they stop by themselves")
        raise
    return failed


def fraction_done(run: AblationRun) -> float:
    """The fraction of its training that a run has done, 0 to 1."""
    try:
        return float(json.loads(_last_line(run.run_dir / "metrics.jsonl"))["fraction"])
    except (ValueError, TypeError, KeyError):
        return 0.0


def _start(plan: AblationPlan, run: AblationRun, slot: Slot) -> Running:
    """Start a run in a process; it resumes from its checkpoint if it has one."""
    settings = plan.settings(run)
    resume = bool(list_checkpoints(run.run_dir / "checkpoints"))
    if run.run_dir.exists() and not resume:
        shutil.rmtree(run.run_dir)
    for path in (settings, plan.log(run)):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(settings, dump_config(run.config).encode())
    command = [sys.executable, "-m", "mmssl.apps.ablate.worker", str(settings), str(run.record)]
    environment = dict(os.environ)
    if slot.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
    # The child inherits these cores, so every library in it counts them correctly.
    with plan.log(run).open("ab") as log, system.restricted_to(slot.cores):
        process = subprocess.Popen(
            [*command, "--resume"] if resume else command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            # Ctrl-C goes to the ablation only, which then stops its runs.
            start_new_session=True,
        )
    return Running(run, slot, process)


def _outcome(plan: AblationPlan, ended: Running, failed: dict[str, str]) -> str:
    """Message about a run that ended; a failure is added to `failed`."""
    run, code = ended.run, ended.process.returncode
    if code == 0:
        return f"finished {run.name}"
    failed[run.name] = f"exit code {code}: {_last_line(plan.log(run)) or 'it printed nothing'}"
    return f"failed   {run.name}: {failed[run.name]} (full log: {plan.log(run)})"


def _stop(running: Sequence[Running]) -> int:
    """Tell the processes to save and stop; returns the number of those that are not done soon."""
    end = time.monotonic() + STOP_SECONDS
    try:
        for r in running:
            _close(r)
        while any(r.process.poll() is None for r in running) and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 10)
    except KeyboardInterrupt:
        for r in running:
            r.process.kill()
        raise
    return sum(r.process.poll() is None for r in running)


def _close(running: Running) -> None:
    assert running.process.stdin is not None
    with suppress(BrokenPipeError):
        running.process.stdin.close()


def _last_line(path: Path) -> str:
    """The last complete line of a file that may be growing; empty if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LAST_BYTES))
        lines = file.read().decode("utf-8", errors="replace").rpartition("\n")[0].split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
