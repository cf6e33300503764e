"""Kill a training run with SIGKILL again and again, resume it each time with another number of processes, and compare
it with the same run never interrupted.

    python scripts/kill_resume.py --kills 20

Every piece is killed, all its processes at once, at a random moment of a random step, checkpoints being written
included. The numbers of the samples of every step, those of the pieces joined, must be the ones of the uninterrupted
run; so must those of the steps that a kill undid.

    python scripts/kill_resume.py --exact --kills 50

One process on a CPU: a third of the kills come while a checkpoint is being written, a third while the run starts, and
a third at random moments of its steps. Weights, optimizer, averaged weights and metrics must end equal to the bit.

    python scripts/kill_resume.py --exact --kills 210 --moments writing starting step signal stall damaged locked

Further kinds of ends: one of the signals that ask a run to stop, after which it must have left within 10 seconds; the
same while the reads of its disk hang; a kill after which a log is damaged; and a second process in the same folder,
which must be refused, before the first is killed. A log that was damaged may lack lines; those it has must be equal.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mmssl import system

LOG = "sample_ids.jsonl"
CLOCKS = ("samples_per_s", "data_wait", "mb_per_s", "seconds", "time_share")
"""Metrics of time, which differ between runs."""
MOMENTS = ("writing", "starting", "step")
MORE_MOMENTS = ("signal", "stall", "damaged", "locked")
LEAVE_SECONDS = 10.0
LOGS = (LOG, "metrics.jsonl")
DAMAGE: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: content[: -len(content) // 3],
    lambda content: content[:-5],
    lambda content: content + bytes(64),
    lambda content: content[: len(content) // 2] + b"\xff\x00" + content[len(content) // 2 + 2 :],
    lambda content: b'{"loss": 1}\n' + content,
    lambda content: b"",
)
"""Changes to the bytes of a log."""
Ids = dict[int, list[int]]
"""Step -> sample numbers of its global batch, in order."""


@dataclass(frozen=True)
class Job:
    """What is trained, by gloo processes forked from this one, which has imported everything: lives are short."""

    config: str
    overrides: list[str]
    log: Path
    """Where the runs' own output goes."""

    def start(self, run: Path, world_size: int) -> list[BaseProcess]:
        """Begin the run, or go on with it."""
        resume = (run / "config.yaml").is_file()
        if not resume:
            # Killed before it wrote its configuration.
            shutil.rmtree(run, ignore_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        overrides = [*self.overrides, f"run_dir={run}"]
        processes: list[BaseProcess] = []
        for rank in range(world_size):
            arguments = (self.config, overrides, resume, rank, world_size, port, self.log)
            processes.append(multiprocessing.get_context("fork").Process(target=train_rank, args=arguments))
            processes[-1].start()
        return processes

    def finish(self, run: Path, world_size: int) -> None:
        """Run to the end."""
        processes = self.start(run, world_size)
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"the run failed; see the end of {self.log}")


def train_rank(
    config: str, overrides: list[str], resume: bool, rank: int, world_size: int, port: int, log: Path
) -> None:
    """One process of a run."""
    from mmssl.config import load_config
    from mmssl.train.trainer import train

    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if world_size > 1:
        words = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_PORT": port,
        }
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in words.items()}})
    train(load_config(config, overrides), resume=resume)


@dataclass
class Pieces:
    """A run that was killed many times."""

    kills: int = 0
    wrong: int = 0
    """Steps, of those undone by a kill too, whose samples were not the expected ones."""


def run_in_pieces(
    job: Job, run: Path, lives: Sequence[int], worlds: Sequence[int], expected: Ids, rng: random.Random
) -> Pieces:
    """Run with a random number of processes for some steps, kill, and so on; then to the end."""
    pieces = Pieces()
    for life in lives:
        world_size = rng.choice(worlds)
        first = max(read_ids(run), default=0)
        before, after = _kill(job.start(run, world_size), run, life, rng.random())
        found = read_ids(run)
        pieces.kills += 1
        pieces.wrong += (wrong := differing(found, expected))
        print(
            f"kill {pieces.kills}: {world_size} processes, log at step {first}, resumed after step {before}, "
            f"killed after step {after}: {wrong} of {len(found)} steps differ",
            flush=True,
        )
    job.finish(run, rng.choice(worlds))
    return pieces


def _kill(processes: Sequence[BaseProcess], run: Path, life: int, part_of_step: float) -> tuple[int, int]:
    """Wait until `life` steps are logged, and some part of another one; kill. Returns the steps before and after."""
    start, first = time.time_ns(), None
    times: list[float] = []
    while len(times) < life:
        if not all(process.is_alive() for process in processes):
            raise SystemExit("the run ended by itself before it could be killed")
        time.sleep(0.002)
        log = run / LOG
        # The log is cut back to the checkpoint when the run begins.
        if not log.is_file() or log.stat().st_mtime_ns < start:
            continue
        last = max(read_ids(run), default=0)
        first = last if first is None else first
        if last >= first + len(times) + 1:
            times.append(time.monotonic())
    assert first is not None
    time.sleep(part_of_step * (times[-1] - times[0]) / max(1, life - 1))
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    return first, max(read_ids(run), default=0)


def read_ids(run: Path) -> Ids:
    """The whole lines of a run's log; the last one may be cut."""
    return {record["step"]: record["ids"] for record in read_lines(run / LOG)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole and name their step."""
    from mmssl.files import read_json_lines

    content = path.read_bytes() if path.is_file() else b""
    whole = content.count(b"\n")
    return [row for row in read_json_lines(path).rows[:whole] if "step" in row]


def differing(found: Ids, expected: Ids) -> int:
    """Steps whose samples are not the expected ones."""
    return sum(expected.get(step) != ids for step, ids in found.items())


def train_in_fork(config: str, overrides: Sequence[str], run: Path, log: Path, reads: int | None) -> None:
    """Begin the run, or go on with it, in a process that has imported everything already.

    Args:
        reads: reads of samples after which the disk hangs. None: it never does.
    """
    from mmssl.config import load_config
    from mmssl.errors import UserError
    from mmssl.train.trainer import train

    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resume = (run / "config.yaml").is_file()
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    if reads is not None:
        hang_after(reads)
    try:
        finished = train(load_config(config, [*overrides, f"run_dir={run}"]), resume=resume)
    except UserError as error:
        print(f"error: {error}", flush=True)
        os._exit(2)
    if finished.signal is not None:
        os._exit(128 + finished.signal)  # threads that read would be waited for


def hang_after(reads: int) -> None:
    """Make the reads of local shards hang in this process, after a number of them."""
    from mmssl.data.storage import LocalFiles

    read, count = LocalFiles.read, itertools.count()

    def hanging(self: LocalFiles, shard: str, start: int, stop: int) -> bytes:
        if next(count) >= reads:
            threading.Event().wait()
        return read(self, shard, start, stop)

    LocalFiles.read = hanging  # type: ignore[method-assign]


@dataclass(frozen=True)
class Exact:
    """The training that is killed, forked from a process that has imported everything, so that a life is short."""

    config: str
    overrides: list[str]
    log: Path

    def start(self, run: Path, reads: int | None = None) -> BaseProcess:
        """Begin the run, or go on with it; `reads` as for `train_in_fork`."""
        arguments = (self.config, self.overrides, run, self.log, reads)
        process = multiprocessing.get_context("fork").Process(target=train_in_fork, args=arguments)
        process.start()
        return process

    def finish(self, run: Path) -> None:
        """Run to the end."""
        process = self.start(run)
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"the run failed; see the end of {self.log}")

    def kill(self, run: Path, moment: str, rng: random.Random) -> bool:
        """Go on with the run and end it at a moment of this kind; returns whether a checkpoint was being written."""
        start, log = time.time_ns(), run / LOG
        process = self.start(run, rng.randint(40, 200) if moment == "stall" else None)

        def writing() -> bool:
            with contextlib.suppress(FileNotFoundError):  # renamed while we looked
                return any(path.stat().st_mtime_ns > start for path in (run / "checkpoints").glob(".writing-*"))
            return False

        if moment == "starting":
            time.sleep(rng.uniform(0, 1.0))
        else:
            # The log is cut back to the checkpoint when the run begins; then steps are added.
            self._wait(process, lambda: log.is_file() and log.stat().st_mtime_ns > start)
            size = log.stat().st_size
            self._wait(process, lambda: log.stat().st_size > size)
        if moment == "writing":
            self._wait(process, writing)
            time.sleep(rng.uniform(0, 0.01))
        elif moment == "stall":
            self._wait(process, lambda: time.time_ns() - log.stat().st_mtime_ns > 0.7e9)
        elif moment != "starting":
            time.sleep(rng.uniform(0, 0.5))
        if process.exitcode is not None:
            raise SystemExit(f"the run ended by itself with exit status {process.exitcode}; see {self.log}")
        if moment == "locked":
            self._check_refused(run)
        self._end(process, rng.choice(system.stop_signals()) if moment in ("signal", "stall") else signal.SIGKILL)
        if moment == "damaged":
            path = run / rng.choice(LOGS)
            path.write_bytes(rng.choice(DAMAGE)(path.read_bytes()))
        return writing()

    def _end(self, process: BaseProcess, number: int) -> None:
        """Send a signal; after one to stop, the process must leave by itself, soon."""
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(LEAVE_SECONDS)
        if process.exitcode not in (-signal.SIGKILL, 128 + number):
            raise SystemExit(f"after signal {number}: exit status {process.exitcode}; see the end of {self.log}")

    def _check_refused(self, run: Path) -> None:
        """Go on with a run that another process trains; it must be refused."""
        second = self.start(run)
        second.join()
        if second.exitcode != 2:
            raise SystemExit(f"a second process ended with status {second.exitcode}; see the end of {self.log}")

    def _wait(self, process: BaseProcess, ready: Callable[[], bool]) -> None:
        while not ready() and process.is_alive():
            time.sleep(0.0003)


def differing_files(run: Path, other: Path, step: int, gaps: bool = False) -> list[str]:
    """What of two finished runs is not equal to the bit; with `gaps`, the logs of the first may lack steps."""
    last = f"checkpoints/step-{step:09d}"
    names = [f"{last}/model.safetensors", f"{last}/optimizer.safetensors", "model/model.safetensors"]
    wrong = [name for name in names if (run / name).read_bytes() != (other / name).read_bytes()]
    for name in LOGS:
        found, expected = (untimed(folder / name) for folder in (run, other))
        kept = {step: record for step, record in expected.items() if step in found or not gaps}
        wrong += [name] if found != kept or step not in found else []
    return wrong


def untimed(path: Path) -> dict[int, dict[str, object]]:
    """Records of every step without clocks."""
    return {
        record["step"]: {k: v for k, v in record.items() if not k.endswith(CLOCKS)}
        for record in map(json.loads, path.read_text().splitlines())
    }


def exact(options: argparse.Namespace, out: Path) -> bool:
    """Kill one process many times; returns whether the run ended as the uninterrupted one did."""
    importlib.import_module("mmssl.train.trainer")  # once here, not in every life
    rng, steps = random.Random(options.seed), 8 * options.kills + 16
    dropout = "model.text.config.hidden_dropout_prob=0.1"
    fixed = ["train.log_samples=true", "train.checkpoint_minutes=null", "train.ema=0.9", "train.trackers=[]", dropout]
    lengths = [f"train.steps={steps}", f"train.checkpoint_steps={options.checkpoint_steps}"]
    training = Exact(options.config, ["evaluate.suites={}", *fixed, *lengths, *options.set], out / "output.txt")
    training.finish(out / "whole")
    print(f"uninterrupted: {steps} steps", flush=True)
    writing = 0
    for number in range(options.kills):
        moment = options.moments[number % len(options.moments)]
        written = training.kill(out / "pieces", moment, rng)
        writing += written
        logged = max(read_ids(out / "pieces"), default=0)
        inside = ", inside a checkpoint's write" if written else ""
        print(f"kill {number + 1} ({moment}): log at step {logged}{inside}", flush=True)
    training.finish(out / "pieces")
    wrong = differing_files(out / "pieces", out / "whole", steps, gaps="damaged" in options.moments)
    end = f"{', '.join(wrong)} DIFFER" if wrong else "weights, optimizer, samples and metrics are equal to the bit"
    print(f"{options.kills} kills, {writing} of them inside a checkpoint's write: {end}")
    return not wrong


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/ci_tiny.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the configuration")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--most-steps", type=int, default=16, help="a piece lives for 1 to so many steps")
    parser.add_argument("--checkpoint-steps", type=int, default=4)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="drawn from for each piece")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and numbers of processes")
    parser.add_argument("--exact", action="store_true", help="one process; compare everything to the bit")
    choices = MOMENTS + MORE_MOMENTS
    parser.add_argument("--moments", nargs="+", choices=choices, default=MOMENTS, help="with --exact: kinds of ends")
    parser.add_argument("--out", type=Path, help="folder for the runs; default: a temporary one")
    return parser.parse_args()


def main() -> None:
    """Kill, resume and compare; exit with 1 if anything differs."""
    options = parse()
    rng = random.Random(options.seed)
    lives = [rng.randint(1, options.most_steps) for _ in range(options.kills)]
    with tempfile.TemporaryDirectory() as temporary:
        out: Path = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        if options.exact:
            raise SystemExit(0 if exact(options, out) else 1)
        importlib.import_module("mmssl.train.trainer")
        steps = sum(lives) + 10
        fixed = ["train.log_samples=true", "train.checkpoint_minutes=null", "train.trackers=[]", "evaluate.suites={}"]
        lengths = [f"train.steps={steps}", f"train.checkpoint_steps={options.checkpoint_steps}"]
        job = Job(options.config, [*fixed, *lengths, *options.set], out / "output.txt")
        job.finish(out / "whole", 1)
        expected = read_ids(out / "whole")
        assert sorted(expected) == list(range(1, steps + 1))
        print(f"uninterrupted: {steps} steps, {sum(map(len, expected.values()))} samples", flush=True)
        pieces = run_in_pieces(job, out / "pieces", lives, options.processes, expected, rng)
        joined = read_ids(out / "pieces")
    same = joined == expected and pieces.wrong == 0
    print(
        f"{pieces.kills} kills, {len(joined)} steps joined: the samples are "
        f"{'those' if same else 'NOT those'} of the uninterrupted run"
    )
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
