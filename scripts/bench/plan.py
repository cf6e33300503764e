"""What the plan of a very large set costs: an epoch's order, and the first batch of a new and of a resumed run.

The set is one small shard under many names, with the index it would have: its plan is as large as any other's.
"""

import io
import json
import multiprocessing
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from mmssl.config import ViewConfig
from mmssl.data import LoaderConfig, Source, TrainLoader
from mmssl.data.order import Position, StreamPlan, default_lanes
from mmssl.data.shards import FOLDER_FILE, SampleLimits, ShardIndex, index_shards, offsets_path
from mmssl.data.sources.catalog import plan_source
from mmssl.data.transforms import Renderer, views
from mmssl.system import peak_memory

SAMPLE_BYTES = 100_000
"""Of the samples whose order is planned: 10 million of them are 1 TB."""
BEGINS = {"new run: index files, plan, first batch": 0.0, "run resumed in mid-epoch: the same": 0.5}
"""Runs that begin, each with the fraction of the second epoch at which it does; 0: at the start of the first."""
_SIDE = 32
FOLDER = "/data/a/folder/of/shards"
LIMIT = SampleLimits().max_member_bytes
Result = TypeVar("Result")


@dataclass(frozen=True)
class Order:
    """An epoch's plan, made from an index in memory."""

    seconds: float
    """From the index entries to the sample numbers of the first batch."""
    cpu_seconds: float
    """CPU time of the same: what it takes on a machine with nothing else to do."""
    extra_bytes: int
    """Peak memory above what the process held with the indexes in place."""
    kept_bytes: int
    """What stays of it, for this epoch."""
    index_bytes: int
    """Memory of the shards' indexes."""


@dataclass(frozen=True)
class Begin:
    """A run that begins, from the pattern of its shards on disk to its first batch."""

    seconds: float
    cpu_seconds: float
    extra_bytes: int
    ids: list[int]
    """Sample numbers of the batch."""


@dataclass(frozen=True)
class PlanCost:
    """Cost of a large plan."""

    samples: int
    shards: int
    batch_size: int
    order: Order
    begins: dict[str, Begin]
    """From files; empty if only the order was measured."""

    def text(self) -> str:
        """The measurements as lines."""
        rows = {"plan of an epoch, first batch's numbers": self.order, **self.begins}
        lines = [f"{self.samples:,} samples in {self.shards:,} shards, batches of {self.batch_size:,}"]
        lines.append(f"{'':42} {'seconds':>8} {'of CPU':>8} {'extra MB':>9}")
        lines += [
            f"{what:42} {c.seconds:8.2f} {c.cpu_seconds:8.2f} {c.extra_bytes / 1e6:9.0f}" for what, c in rows.items()
        ]
        kept = f"{self.order.index_bytes / 1e6:.0f} MB of indexes and {self.order.kept_bytes / 1e6:.0f} MB of the plan"
        return "\n".join([*lines, f"in memory from then on: {kept}"])


def bench_plan(
    samples: int = 10_000_000, shards: int = 10_000, batch_size: int = 4096, *, files: bool = True
) -> PlanCost:
    """Measure a plan of `samples` samples in equal `shards`, each part in a process of its own.

    Args:
        files: also begin runs from files, a name on disk for each shard.
    """
    order = _in_fresh_process(_order, samples // shards, shards, batch_size)
    begins = {}
    if files:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _write_set(folder, samples // shards, shards)
            for what, fraction in BEGINS.items():
                begins[what] = _in_fresh_process(_begin, folder, batch_size, fraction)
    return PlanCost(samples // shards * shards, shards, batch_size, order, begins)


def _in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _reset_peak() -> None:
    """Reset Linux's record of peak memory to the memory held now; elsewhere the record stays."""
    record = Path("/proc/self/clear_refs")
    if record.is_file():
        record.write_text("5")


def _order(per_shard: int, shards: int, batch_size: int) -> Order:
    size, before = per_shard * SAMPLE_BYTES, _memory()
    entries = [
        # Every shard has a name, a size, a time and a checksum of its own, as when read from files.
        ShardIndex(f"{FOLDER}/{i:08}.tar", size + i % 2, i << 40, per_shard, (), (), f"{i:032x}", LIMIT)
        for i in range(shards)
    ]
    _reset_peak()
    indexed, start, cpu = _memory(), time.perf_counter(), time.process_time()
    plan = StreamPlan([plan_source(entries, 1.0, None)], seed=0, lanes=default_lanes(batch_size), block=8)
    numbers = [plan.ids(run) for run in plan.runs(Position(), batch_size, 0, batch_size)]
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    assert sum(map(len, numbers)) == batch_size
    return Order(seconds, cpu_seconds, peak_memory() - indexed, _memory() - indexed, indexed - before)


def _memory() -> int:
    """Memory of this process now, in bytes."""
    return psutil.Process().memory_info().rss


def _begin(folder: Path, batch_size: int, fraction: float) -> Begin:
    """Begin a run at a fraction of `BEGINS`."""
    _reset_peak()
    before, start, cpu = peak_memory(), time.perf_counter(), time.process_time()
    view = views.View(ViewConfig(), _SIDE)
    stream = TrainLoader(
        [Source(_shards(folder))],
        LoaderConfig(seed=0, batch_size=batch_size),
        Renderer({"main": view}, ["{txt}"], seed=0),
        _tokenize,
    )
    if fraction > 0:
        depth = int(fraction * stream.batches_per_epoch) * batch_size // default_lanes(batch_size)
        stream.load_state_dict({**stream.state_dict(), "epoch": 1, "depth": depth})
    with stream:
        batch = next(stream)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return Begin(seconds, cpu_seconds, peak_memory() - before, batch.ids.tolist())


def _tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    """One token per caption: the cost of a tokenizer does not depend on the plan."""
    return torch.zeros(len(texts), 1, dtype=torch.int64), torch.ones(len(texts), 1, dtype=torch.bool)


def _shards(folder: Path) -> list[str]:
    """The shards by name: to a pattern, the links of one file would be one shard."""
    return sorted(map(str, folder.glob("*.tar")))


def _write_set(folder: Path, per_shard: int, shards: int) -> None:
    """One shard, its links, and an index of all."""
    (folder / "one").mkdir()
    shard = folder / "one" / "shard.tar"
    _write_shard(shard, per_shard)
    index_shards([str(shard)], SampleLimits())
    index = json.loads((shard.parent / FOLDER_FILE).read_text())
    (entry,) = index["shards"].values()
    names = [f"{number:06}.tar" for number in range(shards)]
    for name in names:
        (folder / name).symlink_to(shard)
        offsets_path(str(folder / name)).symlink_to(offsets_path(str(shard)))
    index["shards"] = dict.fromkeys(names, entry)
    (folder / FOLDER_FILE).write_text(json.dumps(index))


def _write_shard(path: Path, samples: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    image = io.BytesIO()
    Image.fromarray(noise).save(image, "JPEG")
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            for extension, content in (("jpg", image.getvalue()), ("txt", b"an image")):
                info = tarfile.TarInfo(f"{number:06}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
