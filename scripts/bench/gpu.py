"""A checklist for one GPU: its tests, the training step, the loader beside it, losses, mixes and FSDP2.

Each part is measured by the benchmark of its own, or by a training as users start it, and is caught alone: one that
fails costs no other.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmssl.config import Config, load_config
from mmssl.errors import UserError
from mmssl.files import atomic_write, write_json
from scripts.bench.loss import Case, Loss, LossForm, measure
from scripts.bench.step import StepMeasurement, bench_step

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense products of bf16 by the vendor's data sheets, of the SXM cards."""
MIXES = ("contrastive", "contrastive+mlm", "contrastive+mae", "contrastive+mlm+mae")
WARM_UP = 5
"""Steps of a training that are left out: they start workers and choose kernels."""
RUN = ("evaluate.suites={}", "optim.warmup=0", "mixer.watch_steps=null", "mixer.image_steps=null", "train.epochs=null")
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@dataclass(frozen=True)
class Sizes:
    """The size of each part."""

    config: str
    overrides: tuple[str, ...]
    batches: tuple[int, ...]
    """Batch sizes of the step, each larger than the one before."""
    mix_batch: int
    steps: int
    """Timed steps per measurement."""
    train_steps: int
    """Steps of a training."""
    loss_batches: tuple[int, ...]
    """Batch sizes of the losses, each smaller than the one before: the first that fits is measured."""
    dim: int


FULL = Sizes(
    "configs/vit_b32_bert.yaml",
    ("model.vision.name=open_clip:ViT-B-16", "model.text.vocab_size=3000", "train.precision=bf16"),
    batches=(256, 512, 1024),
    mix_batch=256,
    steps=10,
    train_steps=40,
    loss_batches=(65536, 32768, 16384),
    dim=512,
)
TINY = Sizes("configs/ci_tiny.yaml", (), (8, 16), 16, steps=1, train_steps=6, loss_batches=(256,), dim=16)


@dataclass(frozen=True)
class Row:
    """One measurement; None or an empty note where a column says nothing."""

    part: str
    case: str
    batch: int | None = None
    seconds: float | None = None
    pairs_per_s: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation: operations per second as part of the device's peak."""
    peak_bytes: int | None = None
    note: str = ""

    def cells(self) -> str:
        """A line of the table."""
        values = [
            "" if self.batch is None else f"{self.batch:,}",
            "" if self.seconds is None else f"{self.seconds * 1e3:,.1f}",
            "" if self.pairs_per_s is None else f"{self.pairs_per_s:,.0f}",
            "" if self.mfu is None else f"{self.mfu:.1%}",
            "" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:,.0f}",
        ]
        return " | ".join(["", self.part, self.case, *values, self.note.replace("|", "/"), ""]).strip()


@dataclass(frozen=True)
class Checklist:
    """What one run found."""

    machine: dict[str, str]
    rows: list[Row]
    errors: dict[str, str]
    """Part -> the traceback of what ended it."""

    def table(self) -> str:
        """Everything as one table in Markdown."""
        lines = [", ".join(f"{name} {value}" for name, value in self.machine.items()), ""]
        lines += ["| part | case | batch | ms | pairs/s | MFU | peak MiB | note |", "| --- " * 8 + "|"]
        failed = [Row(part, "failed", note=text.strip().splitlines()[-1][:200]) for part, text in self.errors.items()]
        return "\n".join([*lines, *(row.cells() for row in (*self.rows, *failed))]) + "\n"


def bench_gpu(
    out: Path, sizes: Sizes, device: str, shards: str, only: Sequence[str], say: Callable[[str], None]
) -> Checklist:
    """Run the parts, or those of `only`, and write gpu.json and gpu.md to `out` after each of them.

    Raises:
        UserError: no such part, or the folder cannot be written.
    """
    unknown = sorted(set(only) - PARTS.keys())
    if unknown:
        raise UserError(f"no part is named {unknown[0]!r}; there are {', '.join(PARTS)}")
    found = Checklist(_machine(device), [], {})
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in found.machine["device"]), None)
    for name in only or PARTS:
        say(name)
        try:
            for row in PARTS[name](Job(name, sizes, device, peak, shards, found.rows)):
                found.rows.append(row)
        except Exception:  # whatever it was: the report names it, and the next part has its turn
            found.errors[name] = traceback.format_exc()
        try:
            write_json(out / "gpu.json", asdict(found))
            atomic_write(out / "gpu.md", found.table().encode())
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; give another folder") from None
    return found


@dataclass(frozen=True)
class Job:
    """What a part is given."""

    name: str
    sizes: Sizes
    device: str
    peak_tflops: float | None
    shards: str
    rows: list[Row]
    """Those found so far, also by this part."""

    def overrides(self, batch: int, *more: str) -> list[str]:
        """Changes to the configuration."""
        return [*self.sizes.overrides, f"data.train={self.shards}", f"data.batch_size={batch}", *more]

    def config(self, batch: int, *more: str) -> Config:
        """The configuration of a step."""
        return load_config(self.sizes.config, self.overrides(batch, *more))

    def best_batch(self) -> int:
        """The batch of the fastest step; the smallest one if none was measured."""
        steps = [row for row in self.rows if row.part == "step" and row.pairs_per_s is not None]
        best = max(steps, key=lambda row: row.pairs_per_s or 0, default=None)
        return self.sizes.batches[0] if best is None or best.batch is None else best.batch

    def row(self, case: str, batch: int, measured: StepMeasurement) -> Row:
        """A measured step."""
        speed = batch / measured.seconds
        mfu = None if self.peak_tflops is None else measured.flops * speed / self.peak_tflops / 1e12
        note = f"loss {measured.loss:.4f}"
        return Row(self.name, case, batch, measured.seconds, speed, mfu, measured.peak_bytes, note)


def _tests(job: Job) -> Iterator[Row]:
    """The tests marked `gpu`."""
    files = sorted(str(path) for path in Path("tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1]
    if done.returncode:
        raise UserError(f"{done.stdout[-4000:]}\n{last}")
    yield Row(job.name, "pytest -m gpu", seconds=time.perf_counter() - start, note=last)


def _step(job: Job) -> Iterator[Row]:
    """A contrastive step in growing batches, then compiled in the fastest."""
    for batch in job.sizes.batches:
        try:
            yield job.row("contrastive", batch, _measured_step(job, batch))
        except torch.OutOfMemoryError:
            yield Row(job.name, "contrastive", batch, note="out of memory")
            break
    best = job.best_batch()
    yield job.row("contrastive, compiled", best, _measured_step(job, best, "train.compile=true"))


def _measured_step(job: Job, batch: int, *more: str) -> StepMeasurement:
    config = job.config(batch, *more)
    found = bench_step(config, ["contrastive"], peer=False, rounds=1, steps=job.sizes.steps, warmup=3)
    return found.sides["contrastive"][0]


def _mixes(job: Job) -> Iterator[Row]:
    """Mixes of objectives beside contrastive alone."""
    batch, steps = job.sizes.mix_batch, job.sizes.steps
    found = bench_step(job.config(batch), MIXES, peer=False, rounds=1, steps=steps, warmup=3)
    yield from (job.row(mix, batch, measured[0]) for mix, measured in found.sides.items())


def _loader(job: Job) -> Iterator[Row]:
    """A training that reads shards, at the batch of the fastest step."""
    yield _trained(job, ("-m", "mmssl.train"), {})


def _fsdp2(job: Job) -> Iterator[Row]:
    """The same under FSDP2, as one process whose weights are sharded over itself."""
    yield _trained(job, ("-m", "torch.distributed.run", "--standalone", "-m", "mmssl.train"), FSDP2)


def _trained(job: Job, launcher: Sequence[str], environ: Mapping[str, str]) -> Row:
    batch = job.best_batch()
    with tempfile.TemporaryDirectory() as name:
        changes = [*RUN, f"train.steps={job.sizes.train_steps}", f"run_dir={name}/run"]
        command = [sys.executable, *launcher, job.sizes.config, *job.overrides(batch, *changes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environ})
        if done.returncode:
            raise UserError(f"the training failed: {done.stderr[-4000:]}")
        lines = (Path(name) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines[WARM_UP:]]
    speed = statistics.median(record["samples_per_s"] for record in records)
    waits = statistics.mean(record["data_wait"] for record in records)
    return Row(job.name, "training from shards", batch, batch / speed, speed, note=f"data wait {waits:.1%}")


def _losses(job: Job) -> Iterator[Row]:
    """Ours in torch and in Triton, and open_clip's, each at the largest batch that fits."""
    forms: list[LossForm] = ["blocked", "triton", "open_clip"] if job.device == "cuda" else ["blocked", "open_clip"]
    losses: list[Loss] = ["contrastive", "siglip"]
    for loss in losses:
        for form in forms:
            for batch in job.sizes.loss_batches:
                case = Case(loss, form, batch, job.sizes.dim, job.device, None)
                try:
                    found = measure(case)
                except torch.OutOfMemoryError:
                    yield Row(job.name, f"{loss}, {form}", batch, note="out of memory")
                    continue
                note = f"extra memory; loss {found.loss:.5f}, gradient norm {found.gradient_norm:.5g}"
                yield Row(job.name, f"{loss}, {form}", batch, found.seconds, peak_bytes=found.extra_bytes, note=note)
                break


PARTS: dict[str, Callable[[Job], Iterator[Row]]] = {
    "losses": _losses,
    "step": _step,
    "loader": _loader,
    "fsdp2": _fsdp2,
    "mixes": _mixes,
    "tests": _tests,
}


def _machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in ("torch", "triton")}
    return {"device": name, **versions}
