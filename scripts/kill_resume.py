"""Kill a training run with SIGKILL again and again, resume it each time with another number of processes, and compare
it with the same run never interrupted.

    python scripts/kill_resume.py --kills 20

Every piece is killed, all its processes at once, at a random moment of a random step, checkpoints being written
included. The numbers of the samples of every step, those of the pieces joined, must be the ones of the uninterrupted
run; so must those of the steps that a kill undid.

    python scripts/kill_resume.py --exact --kills 50

One process on a CPU. Weights, optimizer, averaged weights, metrics and evaluations must end equal to the bit. The kinds
of ends take turns, or those that `--moments` names:

    writing    SIGKILL while a checkpoint is being written
    starting   SIGKILL while the run starts
    step       SIGKILL at a random moment
    signal     each signal in turn; after one that asks a run to stop, it must save and leave within 10 seconds
    stall      the same while the disk hangs; with --remote, while a web server that holds the shards hangs
    damaged    SIGKILL, then a log is cut, emptied, filled with NUL bytes, made a folder, and so on
    locked     a second process in the same folder must be refused in one line, and the first go on; then SIGKILL

A log that was damaged may lack lines; those it has must be equal.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mmssl import system
from mmssl.files import read_json_lines, remove

LOG = "sample_ids.jsonl"
CLOCKS = ("samples_per_s", "data_wait", "mb_per_s", "seconds", "time_share")
"""Metrics of time, which differ between runs."""
MOMENTS = ("writing", "starting", "step", "signal", "stall", "damaged", "locked")
LEAVE_SECONDS = 10.0
MODULES = "modules.txt"
"""Names of the modules that a whole run imports."""
STALL_NANOSECONDS = 700_000_000
"""A log that does not grow for this long shows that the run waits."""
LOGS = (LOG, "metrics.jsonl", "evaluations.jsonl")
CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: -len(content) // 3],
    "cut by five bytes": lambda content: content[:-5],
    "followed by NUL bytes": lambda content: content + bytes(64),
    "not UTF-8": lambda content: content[: len(content) // 2] + b"\xff\x00" + content[len(content) // 2 + 2 :],
    "with a foreign line": lambda content: b'{"loss": 1}\n' + content,
    "empty": lambda content: b"",
}
FOLDER, FILE = "a folder", "a file"
DAMAGE = [
    *((name, change) for change in (*CHANGES, FOLDER) for name in (*LOGS, "rewound.json")),
    ("tensorboard", FILE),
]
"""Files and folders of a run, and what becomes of them."""
SHARDS = ("shards/train/train-00000.tar", "shards/train/*.tar")
"""What is evaluated, and what a web server serves."""
FORK = multiprocessing.get_context("fork")
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
            processes.append(FORK.Process(target=train_rank, args=arguments))
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
    content = path.read_bytes() if path.is_file() else b""
    whole = content.count(b"\n")
    return [row for row in read_json_lines(path).rows[:whole] if "step" in row]


def differing(found: Ids, expected: Ids) -> int:
    """Steps whose samples are not the expected ones."""
    return sum(expected.get(step) != ids for step, ids in found.items())


def train_in_fork(config: str, overrides: Sequence[str], run: Path, log: Path, hang: Path) -> None:
    """Begin the run, or go on with it, in a process that has imported everything already.

    Args:
        hang: while this file exists, reads of local shards hang.
    """
    from mmssl.config import load_config
    from mmssl.data.storage import LocalFiles
    from mmssl.errors import UserError
    from mmssl.train.trainer import train

    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resume = (run / "config.yaml").is_file()
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    read = LocalFiles.read

    def hanging(self: LocalFiles, shard: str, start: int, stop: int) -> bytes:
        if hang.exists():
            threading.Event().wait()
        return read(self, shard, start, stop)

    LocalFiles.read = hanging  # type: ignore[method-assign]
    try:
        finished = train(load_config(config, [*overrides, f"run_dir={run}"]), resume=resume)
    except UserError as error:
        print(f"error: {error}", flush=True)
        os._exit(2)
    if finished.signal is not None:
        os._exit(128 + finished.signal)  # threads that read would be waited for
    log.with_name(MODULES).write_text("\n".join(sys.modules), encoding="utf-8")


class _Shards(BaseHTTPRequestHandler):
    """Byte ranges of the files in a folder."""

    folder: Path
    hang: Path
    """While this file exists, answers stop in their middle and hold the connection."""

    def do_GET(self) -> None:
        """Send the bytes that are asked for."""
        path = self.folder / Path(self.path).name
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else size
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        content = path.read_bytes()[start:stop]
        self.wfile.write(content[: len(content) // 2])
        while path.suffix == ".tar" and self.hang.exists():
            time.sleep(0.05)
        self.wfile.write(content[len(content) // 2 :])

    def log_message(self, *message: object) -> None:
        """Stay silent."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients are killed: that is the point."""


def serve_copy(pattern: str, out: Path, hang: Path) -> str:
    """Serve a copy of local shards from a process of its own; returns the pattern of their URLs."""
    from mmssl.data.shards import SampleLimits, index_shards

    folder = out / "served"
    folder.mkdir(exist_ok=True)
    shards = [str(shutil.copy(path, folder)) for path in sorted(Path().glob(pattern))]
    index_shards(shards, SampleLimits())
    server = _Server(("127.0.0.1", 0), type("Shards", (_Shards,), {"folder": folder, "hang": hang}))
    FORK.Process(target=server.serve_forever, daemon=True).start()
    names = ",".join(Path(shard).name for shard in shards)
    return f"http://127.0.0.1:{server.server_port}/{{{names}}}"


@dataclass
class Exact:
    """The training that is killed, forked from a process that has imported everything, so that a life is short."""

    config: str
    overrides: list[str]
    out: Path
    rng: random.Random
    remote: bool
    """The shards lie on a web server."""
    kills: Counter[str] = field(default_factory=Counter)
    """Kind of end -> how often it came."""
    inside: int = 0
    """Kills inside a checkpoint's write."""

    @property
    def log(self) -> Path:
        """The runs' own output."""
        return self.out / "output.txt"

    @property
    def hang(self) -> Path:
        """The file that makes reads hang."""
        return self.out / "hang"

    def start(self, run: Path, log: Path | None = None) -> BaseProcess:
        """Begin the run, or go on with it."""
        arguments = (self.config, self.overrides, run, log or self.log, self.hang)
        process = FORK.Process(target=train_in_fork, args=arguments, daemon=True)
        process.start()
        return process

    def finish(self, run: Path) -> None:
        """Run to the end."""
        process = self.start(run)
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"the run failed; see the end of {self.log}")

    def kill(self, run: Path, moment: str) -> str:
        """Go on with the run and end it at a moment of this kind; returns a description."""
        start, log = time.time_ns(), run / LOG
        # A small dataset from a server stays in memory after its first read.
        if waits_at_once := moment == "stall" and self.remote:
            self.hang.touch()
        process = self.start(run)
        if moment == "starting":
            time.sleep(self.rng.uniform(0, 1.0))
        else:
            # The log is cut back to the checkpoint when the run begins; then steps are added.
            self._wait(process, lambda: log.is_file() and log.stat().st_mtime_ns > start)
            if not waits_at_once:
                self._wait_for_step(process, log)
        if moment == "writing":
            self._wait(process, lambda: _writing(run, start))
            time.sleep(self.rng.uniform(0, 0.01))
        elif moment == "stall":
            self.hang.touch()
            self._wait(process, lambda: time.time_ns() - log.stat().st_mtime_ns > STALL_NANOSECONDS)
        elif moment != "starting":
            time.sleep(self.rng.uniform(0, 0.5))
        if process.exitcode is not None:
            raise SystemExit(f"the run ended by itself with exit status {process.exitcode}; see {self.log}")
        if moment == "locked":
            self._check_refused(run)
            self._wait_for_step(process, log)
        turn = self.kills[moment]
        self.kills[moment] += 1
        signals = {"signal": [*system.stop_signals(), signal.SIGKILL], "stall": system.stop_signals()}
        number = signals[moment][turn % len(signals[moment])] if moment in signals else signal.SIGKILL
        self._end(process, number, run)
        self.hang.unlink(missing_ok=True)
        inside = _writing(run, start)
        self.inside += inside
        parts = [moment, signal.Signals(number).name, *(["inside a checkpoint's write"] if inside else [])]
        return ", ".join([*parts, *([self._damage(run, turn)] if moment == "damaged" else [])])

    def _end(self, process: BaseProcess, number: int, run: Path) -> None:
        """Send a signal; after one to stop, the process must save its last step and leave by itself, soon."""
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(LEAVE_SECONDS)
        if process.exitcode != (-number if number == signal.SIGKILL else 128 + number):
            raise SystemExit(f"after signal {number}: exit status {process.exitcode}; see the end of {self.log}")
        last = max(read_ids(run), default=0)
        if last > 0 and number != signal.SIGKILL and not (run / "checkpoints" / f"step-{last:09d}").is_dir():
            raise SystemExit(f"after signal {number}: step {last} was not saved; see the end of {self.log}")

    def _check_refused(self, run: Path) -> None:
        """Go on with a run that another process trains; it must be refused."""
        log = self.out / "second.txt"
        log.unlink(missing_ok=True)
        second = self.start(run, log)
        second.join(60)
        said = log.read_text(encoding="utf-8").splitlines()
        if second.exitcode != 2 or len(said) != 1 or "is in use by process" not in said[0]:
            raise SystemExit(f"a second process ended with status {second.exitcode} and said: {said}")

    def _damage(self, run: Path, turn: int) -> str:
        """Damage a file of the run; returns what was done."""
        name, change = DAMAGE[turn % len(DAMAGE)]
        path = run / name
        content = path.read_bytes() if path.is_file() else b'{"step": 1, "batches": 2}\n'
        remove(path)
        if change == FOLDER:
            path.mkdir()
        else:
            path.write_bytes(CHANGES.get(change, bytes)(content))
        return f"{name} {change}"

    def _wait_for_step(self, process: BaseProcess, log: Path) -> None:
        size = log.stat().st_size
        self._wait(process, lambda: log.stat().st_size > size)

    def _wait(self, process: BaseProcess, ready: Callable[[], bool]) -> None:
        while not ready() and process.is_alive():
            time.sleep(0.0003)


def _writing(run: Path, start: int) -> bool:
    """Whether a checkpoint is being written, or was when the process ended, begun after a time in nanoseconds."""
    with contextlib.suppress(FileNotFoundError):  # renamed while we looked
        return any(path.stat().st_mtime_ns > start for path in (run / "checkpoints").glob(".writing-*"))
    return False


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


def untimed(path: Path) -> dict[int, Any]:
    """Records of every step without clocks."""
    records = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return {record["step"]: _without_clocks(record) for record in records}


def _without_clocks(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key: _without_clocks(value) for key, value in tree.items() if not key.endswith(CLOCKS)}


def exact(options: argparse.Namespace, out: Path) -> bool:
    """Kill one process many times; returns whether the run ended as the uninterrupted one did."""
    steps, began = 5 * options.kills + 16, time.monotonic()
    training = Exact(options.config, [], out, random.Random(options.seed), options.remote)
    fixed = ["train.log_samples=true", "train.checkpoint_minutes=null", "train.ema=0.9", "train.trackers=[tensorboard]"]
    fixed += ["model.text.config.hidden_dropout_prob=0.1", f"evaluate.every={16 * options.checkpoint_steps}"]
    fixed += [f"evaluate.suites={{pairs: {{data: {SHARDS[0]}, task: geometry}}}}"]
    lengths = [f"train.steps={steps}", f"train.checkpoint_steps={options.checkpoint_steps}"]
    training.overrides = [*fixed, *lengths, *options.set]
    if options.remote:
        training.overrides += [f"data.train='{serve_copy(SHARDS[1], out, training.hang)}'"]
    importlib.import_module("mmssl.train.trainer")
    training.finish(out / "whole")
    for name in (out / MODULES).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ImportError):  # made by another module while that is imported
            importlib.import_module(name)  # once here, not in every life
    print(f"uninterrupted: {steps} steps", flush=True)
    for number in range(options.kills):
        described = training.kill(out / "pieces", options.moments[number % len(options.moments)])
        logged, minutes = max(read_ids(out / "pieces"), default=0), (time.monotonic() - began) / 60
        print(f"kill {number + 1} of {options.kills} ({described}): step {logged}, {minutes:.1f} min", flush=True)
    training.finish(out / "pieces")
    wrong = differing_files(out / "pieces", out / "whole", steps, gaps="damaged" in options.moments)
    end = f"{', '.join(wrong)} DIFFER" if wrong else "weights, optimizer, samples and metrics are equal to the bit"
    print(f"{options.kills} kills, {training.inside} of them inside a checkpoint's write: {end}")
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
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS, help="with --exact: kinds of ends")
    parser.add_argument("--remote", action="store_true", help="with --exact: the shards lie on a web server")
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
