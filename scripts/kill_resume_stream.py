"""Kill the training stream with SIGKILL again and again, and check that not one sample is lost or repeated.

    python scripts/kill_resume_stream.py --kills 20

Each piece runs with 1, 2 or 4 processes, with 0 to 3 worker threads each, and is killed at a random moment.
The next piece resumes from the last state written. The sample ids of the pieces, joined, must be those of one
uninterrupted run.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from torch import Tensor

from mmssl.data.loader import Source, TrainStream
from mmssl.types import Sample

BATCH = 16
STATE_STEPS = 5
"""A state is written every so many steps."""


@dataclass
class Rendered:
    """Two bytes of each picture."""

    views: dict[str, Tensor]
    texts: list[str]
    bad: list[tuple[int, str]]


def render(samples: Sequence[Sample], epoch: int) -> Rendered:
    """Nothing to decode: the pictures are their keys."""
    pixels = torch.tensor([[s.image[0], s.image[-1], epoch % 256] for s in samples], dtype=torch.uint8)
    return Rendered({"main": pixels.view(-1, 3, 1, 1)}, [s.fields["txt"] for s in samples], [])


def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    """One token a caption."""
    return torch.zeros(len(texts), 1, dtype=torch.int64), torch.ones(len(texts), 1, dtype=torch.bool)


def open_stream(shards: Sequence[str], rank: int, world: int, workers: int) -> TrainStream:
    """The stream under test."""
    return TrainStream(
        [Source(shards)],
        seed=7,
        batch_size=BATCH,
        lanes=8,
        shuffle_block=3,
        slice_mib=0.02,
        rank=rank,
        world=world,
        workers=workers,
        render=render,
        tokenize=tokenize,
    )


def train(
    folder: Path, shards: Sequence[str], rank: int, world: int, workers: int, steps: int, all_ranks: Barrier
) -> None:
    """One process of a piece: write down the ids of every step, and every few steps the state."""
    stream, first = open_stream(shards, rank, world, workers), 0
    saved = folder / "state.json"
    if saved.exists():
        found = json.loads(saved.read_text())
        stream.load_state_dict(found["stream"])
        first = found["step"]
    with (folder / f"ids-{rank}.jsonl").open("w") as log:
        for step in range(first, steps):
            log.write(json.dumps([step, next(stream).ids.tolist()]) + "\n")
            log.flush()
            all_ranks.wait()
            if rank == 0 and (step + 1) % STATE_STEPS == 0:
                temporary = folder / "state.tmp"
                temporary.write_text(json.dumps({"step": step + 1, "stream": stream.state_dict()}))
                temporary.replace(saved)
            all_ranks.wait()
    stream.close()


def run_piece(
    folder: Path, shards: Sequence[str], world: int, workers: int, steps: int, lives: int | None
) -> dict[int, list[int]]:
    """Run all processes of a piece and kill them in their step `lives`; step -> ids of the global batch."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(world)
    arguments = [(folder, shards, rank, world, workers, steps, barrier) for rank in range(world)]
    processes = [context.Process(target=train, args=a) for a in arguments]
    for process in processes:
        process.start()
    log = folder / "ids-0.jsonl"
    while lives is not None and (not log.exists() or log.read_text().count("\n") < lives):
        time.sleep(0.001)
    for process in processes if lives is not None else []:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    logs = [_read_log(folder / f"ids-{rank}.jsonl") for rank in range(world)]
    whole = set.intersection(*(set(log) for log in logs))
    return {step: [number for log in logs for number in log[step]] for step in sorted(whole)}


def _read_log(path: Path) -> dict[int, list[int]]:
    """The whole lines of a log; the last one may be cut."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    path.unlink(missing_ok=True)
    return dict(map(json.loads, lines))


def write_shards(folder: Path) -> list[str]:
    """1,003 samples in 9 shards of different lengths."""
    paths = []
    for shard, count in enumerate([1, 200, 37, 150, 99, 301, 5, 110, 100]):
        path = folder / f"{shard:02d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(count):
                for extension, content in (("jpg", b"%d-%d" % (shard, number)), ("txt", b"text")):
                    info = tarfile.TarInfo(f"{shard}-{number}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        paths.append(str(path))
    return paths


def main() -> None:
    """Kill and resume; exit with 1 if the ids differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    lives = [rng.randint(1, 60) for _ in range(options.kills)]
    steps = sum(lives) + 100
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_shards(folder)
        alone = open_stream(shards, 0, 1, 0)
        expected = {step: next(alone).ids.tolist() for step in range(steps)}
        joined: dict[int, list[int]] = {}
        for life in [*lives, None]:
            world, workers = rng.choice([1, 2, 4]), rng.randrange(4)
            found = run_piece(folder, shards, world, workers, steps, life)
            wrong = [step for step, ids in found.items() if ids != expected[step]]
            joined |= found
            end = "finished" if life is None else f"killed in step {max(found, default=-1) + 1}"
            print(f"{world} processes x {workers} workers, {len(found)} steps, {end}: {len(wrong)} differ", flush=True)
    same = joined == expected
    print(
        f"{options.kills} kills, {steps} steps joined: {'equal to' if same else 'DIFFERENT from'} the uninterrupted run"
    )
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
