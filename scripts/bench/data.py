"""Samples per CPU-second of the training loader and of OpenCLIP's, on the same shards with the same augmentations."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

import psutil

from mmssl.data import expand
from mmssl.data.transforms import views
from mmssl.errors import UserError
from scripts.bench.mmssl_loader import LoaderSettings
from scripts.bench.photographs import QUALITY, write_shards

PEER_SIDE = Path(__file__).with_name("openclip_loader.py")
OURS = "scripts.bench.mmssl_loader"
_LOOK_SECONDS = 0.05
_QUIET_LOOKS = 4
_QUIET_LIMIT = 300.0
_MEMORY_SAMPLES = 512

Kind = Literal["stream", "normalised", "limit", "open_clip"]
Case = tuple[Kind, views.DecodeMode]
CASES: tuple[Case, ...] = (
    ("stream", "quality"),
    ("open_clip", "quality"),
    ("stream", "fast"),
    ("normalised", "quality"),
    ("limit", "quality"),
    ("limit", "fast"),
)
_NAMES = {"stream": "mmssl", "normalised": "mmssl, normalised on the CPU", "limit": "limit", "open_clip": "open_clip"}


@dataclass(frozen=True)
class Rates:
    """Samples per CPU-second of one case, one value per round."""

    kind: Kind
    mode: views.DecodeMode
    per_cpu_second: list[float]


@dataclass(frozen=True)
class LoaderComparison:
    """All cases on the same shards."""

    shards: str
    """Description of the shards."""
    samples: int
    """Measured each time."""
    rates: list[Rates]

    def find(self, kind: Kind, mode: views.DecodeMode) -> list[float]:
        """Values of one case; empty if it was left out."""
        return next((r.per_cpu_second for r in self.rates if (r.kind, r.mode) == (kind, mode)), [])

    def text(self) -> str:
        """A table: medians with their range over rounds, and the ratios of the rounds."""
        lines = [f"{self.shards}; {self.samples:,} samples per measurement; median [least, most] of the rounds"]
        lines.append(f"{'':38} {'samples per CPU-second':>24} {'times open_clip':>20} {'of the limit':>13}")
        theirs = self.find("open_clip", "quality")
        for rates in self.rates:
            name = _NAMES[rates.kind] + ("" if rates.kind == "open_clip" else f", {rates.mode}")
            line = f"{name:38} {spread(rates.per_cpu_second, '.0f'):>24}"
            if rates.kind in ("stream", "normalised"):
                ratios = [ours / peer for ours, peer in zip(rates.per_cpu_second, theirs, strict=False)]
                limit = self.find("limit", rates.mode)
                part = [ours / most for ours, most in zip(rates.per_cpu_second, limit, strict=True)]
                line += f" {spread(ratios, '.2f') if ratios else '':>20} {statistics.median(part):>13.0%}"
            lines.append(line)
        return "\n".join(lines)


@dataclass(frozen=True)
class Memory:
    """Memory of a process that runs the loader, after each epoch, in bytes."""

    samples: int
    """Of an epoch."""
    held: list[int]

    def text(self) -> str:
        """One line: every epoch, and by how much the later half is above the earlier one."""
        mib = [round(held / 2**20) for held in self.held]
        half = max(1, len(mib) // 2)
        growth = statistics.mean(self.held[half:]) / statistics.mean(self.held[1 : half + 1]) - 1
        return (
            f"memory of the loader after each of {len(mib)} epochs of {self.samples} samples, MiB: "
            f"{' '.join(map(str, mib))}; later half against earlier: {growth:+.1%}"
        )


@dataclass(frozen=True)
class DataReport:
    """Everything measured."""

    comparisons: list[LoaderComparison]
    memory: Memory | None

    def text(self) -> str:
        """All tables."""
        parts = [c.text() for c in self.comparisons] + ([] if self.memory is None else [self.memory.text()])
        return "\n\n".join(parts)

    def json(self) -> str:
        """All measurements as JSON."""
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    peer_python: str | None
    """Interpreter of OpenCLIP's environment; None leaves OpenCLIP out."""
    image_size: int = 224
    batch_size: int = 256
    batches: int = 6
    """Measured each time: one pass over the photographs."""
    warm_up: int = 2
    workers: int = 1
    rounds: int = 3
    quality: int = QUALITY
    """Of the JPEGs made."""
    epochs: int = 20
    """Over which memory is watched, 2 or more; 0 leaves it out."""


def bench_data(
    options: Options,
    *,
    sides: Sequence[int] = (512, 1024),
    shards: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> DataReport:
    """Measure every case in turn, `rounds` times, each in a process of its own.

    Args:
        sides: shorter sides of made-up photographs; not used with `shards`.
        shards: a pattern of shards to read instead.
        progress: called with what is measured next.

    Raises:
        UserError: shards are missing, or a side failed.
    """
    say = progress or (lambda what: None)
    comparisons: list[LoaderComparison] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, paths in _sets(folder, sides, shards, options, say):
            log = folder / "log.txt"
            comparisons.append(_compare(what, paths, options, log, say))
        memory = None
        if options.epochs > 0:
            say(f"memory over {options.epochs} epochs")
            memory = _watch(folder, options)
    return DataReport(comparisons, memory)


def _sets(
    folder: Path, sides: Sequence[int], shards: str | None, options: Options, say: Callable[[str], None]
) -> Iterator[tuple[str, list[str]]]:
    if shards is not None:
        yield shards, expand(shards)
        return
    for side in sides:
        say(f"making {side}-px photographs")
        paths = write_shards(folder / str(side), side, options.batch_size * options.batches, quality=options.quality)
        mean = sum(Path(path).stat().st_size for path in paths) / (options.batch_size * options.batches)
        yield f"photographs of {side} px (shorter side), quality {options.quality}, {mean / 1e3:.0f} kB each", paths


def _compare(what: str, shards: list[str], options: Options, log: Path, say: Callable[[str], None]) -> LoaderComparison:
    cases = [case for case in CASES if case[0] != "open_clip" or options.peer_python is not None]
    found: Mapping[Case, list[float]] = {case: [] for case in cases}
    samples = options.batch_size * options.batches
    for number in range(options.rounds):
        for kind, mode in cases:
            say(f"{what}: round {number + 1} of {options.rounds}, {kind} {mode}")
            command = _command(kind, mode, shards, options)
            found[kind, mode].append(samples / cpu_seconds(command, log))
    return LoaderComparison(what, samples, [Rates(kind, mode, found[kind, mode]) for kind, mode in cases])


def _command(kind: Kind, mode: views.DecodeMode, shards: list[str], options: Options) -> list[str]:
    if kind == "open_clip":
        assert options.peer_python is not None
        names = ("image_size", "batch_size", "workers", "warm_up", "batches")
        settings = {"shards": shards} | {name: getattr(options, name) for name in names}
        return [options.peer_python, str(PEER_SIDE), json.dumps(settings)]
    return loader_command(_settings(kind, mode, shards, options))


def _settings(
    kind: Literal["stream", "normalised", "limit"], mode: views.DecodeMode, shards: list[str], options: Options
) -> LoaderSettings:
    o = options
    return LoaderSettings(kind, shards, mode, o.image_size, o.batch_size, o.workers, o.warm_up, o.batches)


def loader_command(settings: LoaderSettings) -> list[str]:
    """The process that runs mmssl's side with these settings."""
    return [sys.executable, "-m", OURS, settings.json()]


def cpu_seconds(command: Sequence[str], log: Path) -> float:
    """CPU time, user and system, of a process and all that it started, between `ready` and `done`.

    It is read when nothing runs any more: what is made ahead is then as much at the end as at the beginning.
    """
    with log.open("w") as errors, _process(command, errors) as child:
        _await(child, "ready", command, log)
        before = _settled(child.pid)
        _go_on(child)
        _await(child, "done", command, log)
        after = _settled(child.pid)
        _go_on(child)
    return after - before


def _watch(folder: Path, options: Options) -> Memory:
    shards = write_shards(folder / "memory", 256, _MEMORY_SAMPLES)
    settings = LoaderSettings("epochs", shards, "quality", options.image_size, 32, options.workers, 0, options.epochs)
    done = subprocess.run(loader_command(settings), stdout=subprocess.PIPE, text=True, check=True)
    return Memory(_MEMORY_SAMPLES, json.loads(done.stdout.splitlines()[-1]))


def _process(command: Sequence[str], errors: IO[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)


def _await(child: subprocess.Popen[str], word: str, command: Sequence[str], log: Path) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == word:
            return
    child.wait()
    last = next(iter(log.read_text().strip().splitlines()[-1:]), "without a word")
    raise UserError(f"{' '.join(command[:3])} failed with exit status {child.returncode}: {last}")


def _go_on(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def _settled(pid: int) -> float:
    """CPU seconds of a process tree, once it has stopped working ahead: no thread runs or waits for its turn."""
    root, end, quiet = psutil.Process(pid), time.monotonic() + _QUIET_LIMIT, 0
    while quiet < _QUIET_LOOKS and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
        quiet = 0 if _is_busy(root) else quiet + 1
    return _cpu_of_tree(root)


def _is_busy(root: psutil.Process) -> bool:
    """Whether Linux lists a thread of the tree as running, ready to, or waiting for a disk."""
    tree = (root, *root.children(recursive=True))
    stats = [stat for process in tree for stat in Path(f"/proc/{process.pid}/task").glob("*/stat")]
    # The state follows the name, which stands in parentheses.
    return any(stat.read_text().rpartition(") ")[2][0] in "RD" for stat in stats)


def _cpu_of_tree(root: psutil.Process) -> float:
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return float(sum(t.user + t.system + t.children_user + t.children_system for t in times))


def spread(values: Sequence[float], form: str) -> str:
    """Median [least, most]."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"
