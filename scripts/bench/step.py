"""Time and memory of a training step: mixes of objectives beside each other, and beside open_clip's own model and loss.

All sides start from the same weights and see the same batches of images and captions, decoded beforehand. Each
measurement has a process of its own, and the sides take turns.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmssl import build, precision
from mmssl.config import Config, ObjectiveConfig
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.objectives import mix_spec, mixing
from mmssl.rng import torch_seed
from mmssl.system import peak_memory
from mmssl.train.cost import predicted_cost
from mmssl.train.optim import build_optimizer, update
from mmssl.train.setup import build_accelerator, compile_towers
from mmssl.train.step import Step, backward
from mmssl.types import Batch
from scripts.bench.openclip_step import OPEN_CLIP, TEXT_CONFIG, TOKENIZER, WEIGHTS, OpenClip

T = TypeVar("T")
BATCHES = 4
"""Distinct batches that are cycled through."""


@dataclass(frozen=True)
class StepMeasurement:
    """Measured steps of one side in a process of its own."""

    seconds: float
    """Mean seconds per step."""
    peak_bytes: int
    """Peak memory of the process (on a GPU: peak allocation there)."""
    loss: float
    """Of the first step, before any update."""
    flops: float
    """Floating-point operations per sample, forward and backward; 0 if not counted."""


@dataclass(frozen=True)
class StepBench:
    """Measurements by side, in turn."""

    batch_size: int
    sides: dict[str, list[StepMeasurement]]

    def text(self, peak_tflops: float | None = None) -> str:
        """A table: medians over rounds, and ratios to the first side with their range in brackets.

        Args:
            peak_tflops: peak TFLOP/s of the device at this precision, for the model FLOPs utilisation.
        """
        first = next(iter(self.sides))
        width = max(len(name) for name in self.sides) + 2
        lines = [f"{'side':{width}}{'s/step':>9} {'samples/s':>10} {'peak MiB':>9} {'first loss':>11}"]
        for name, measurements in self.sides.items():
            seconds = statistics.median(m.seconds for m in measurements)
            peak = statistics.median(m.peak_bytes for m in measurements) / 2**20
            speed, loss = self.batch_size / seconds, measurements[0].loss
            line = f"{name:{width}}{seconds:9.3f} {speed:10.1f} {peak:9.0f} {loss:11.6f}"
            if measurements[0].flops > 0:
                rate = measurements[0].flops * self.batch_size / seconds / 1e12
                line += f"  {rate:.2f} TFLOP/s" + ("" if peak_tflops is None else f", MFU {rate / peak_tflops:.1%}")
            lines.append(line)
        for name, measurements in list(self.sides.items())[1:]:
            pairs = list(zip(self.sides[first], measurements, strict=True))
            time_ratio = _ratio([b.seconds / a.seconds for a, b in pairs])
            memory = _ratio([b.peak_bytes / a.peak_bytes for a, b in pairs])
            lines.append(f"{name} / {first}: step time x {time_ratio}, peak memory x {memory}")
        return "\n".join(lines)


class _Side(Protocol):
    """One side of the comparison."""

    flops: float
    """Operations per sample, or 0."""

    def prepare(self, batch: Batch) -> Any:
        """A batch as this side's data workers hand it out; not timed."""

    def step(self, number: int, inputs: Any) -> Tensor:
        """One update; returns the loss."""


@dataclass(frozen=True)
class _StepJob:
    """Job of a measuring process."""

    config: Config
    side: str
    folder: Path
    """Holds what `_write_inputs` wrote."""
    steps: int
    warmup: int


def bench_step(
    config: Config,
    mixes: Sequence[str] = (mix_spec.ALL,),
    *,
    peer: bool = True,
    rounds: int = 3,
    steps: int = 4,
    warmup: int = 1,
) -> StepBench:
    """Measure steps of a configuration's towers with each mix of objectives, and of open_clip beside them.

    Args:
        mixes: as `mmssl.objectives._mix_spec` reads them; `all` is the configuration's own mix.
        peer: also measure open_clip, which needs towers it can build: `open_clip:MODEL` and `model.text.config`.
        rounds: measurements of each side.
        steps: timed steps per measurement; an objective that acts on every k-th step wants a multiple of k.
        warmup: steps before them, which are not timed.

    Raises:
        UserError: an unknown objective, data or towers that cannot be used.
    """
    if config.train.micro_batch == "auto":
        raise UserError("train.micro_batch=auto depends on what is free; give a number, or null, to measure")
    if config.train.precision == "auto":
        chosen = precision.choose_precision("cuda" if torch.cuda.is_available() else "cpu").precision
        config = config.model_copy(update={"train": config.train.model_copy(update={"precision": chosen})})
    if peer:
        check_peer(config)
    sides = {mix: _with_objectives(config, mix) for mix in mixes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _in_fresh_process(_write_inputs, config, list(sides.values()), folder)
        jobs = {mix: _StepJob(changed, mix, folder, steps, warmup) for mix, changed in sides.items()}
        if peer:
            jobs[OPEN_CLIP] = _StepJob(config, OPEN_CLIP, folder, steps, warmup)
        measured: dict[str, list[StepMeasurement]] = {side: [] for side in jobs}
        for _ in range(rounds):
            for side, job in jobs.items():
                measured[side].append(_in_fresh_process(_measure, job))
    return StepBench(config.data.batch_size, measured)


def _with_objectives(config: Config, mix: str) -> Config:
    entries = mix_spec.parse_mix(mix, config.objectives).objectives
    chosen = {name: ObjectiveConfig(**entry) for name, entry in entries.items()}
    return config.model_copy(update={"objectives": chosen})


def _in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _write_inputs(config: Config, mixes: Sequence[Config], folder: Path) -> None:
    """Write weights of the towers, and batches with every view that any of the mixes needs."""
    plan = build.resolve(config)
    tokenizer = build.build_tokenizer(plan, folder / TOKENIZER)
    tokenizer.save(folder / TOKENIZER)
    torch.manual_seed(torch_seed(config.seed, "weights"))
    encoder = build.build_encoder(config, tokenizer)
    save_file(encoder.state_dict(), folder / WEIGHTS)
    encoder.text.encoder.config.save_pretrained(folder / TEXT_CONFIG)
    together = {name: options for mix in mixes for name, options in mix.objectives.items()}
    config = config.model_copy(update={"objectives": together})
    task = build.build_task(plan.objectives, encoder, tokenizer, World())
    tensors: dict[str, Tensor] = {}
    with build.build_loader(plan, task, tokenizer, folder / "bad_samples.jsonl") as stream:
        for i, batch in enumerate(islice(stream, BATCHES)):
            tensors |= {f"{i}/view/{name}": view for name, view in batch.views.items()}
            tensors |= {f"{i}/tokens": batch.tokens, f"{i}/token_mask": batch.token_mask, f"{i}/ids": batch.ids}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "batches.safetensors")


def read_batches(path: Path) -> list[Batch]:
    """The batches that `_write_inputs` wrote."""
    tensors = load_file(path)
    if torch.cuda.is_available():
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}  # as the loader gives them
    batches = []
    for i in range(BATCHES):
        views = {n.split("/", 2)[2]: t for n, t in tensors.items() if n.startswith(f"{i}/view/")}
        ids = tensors[f"{i}/ids"]
        keys = [str(number) for number in ids.tolist()]
        batches.append(Batch(views, tensors[f"{i}/tokens"], tensors[f"{i}/token_mask"], ids, keys))
    return batches


def _measure(job: _StepJob) -> StepMeasurement:
    if job.config.train.threads is not None:
        torch.set_num_threads(job.config.train.threads)
    batches = read_batches(job.folder / "batches.safetensors")
    side: _Side = OpenClip(job.config, job.folder) if job.side == OPEN_CLIP else _Ours(job.config, job.folder)
    losses, seconds = [], []
    for i in range(job.warmup + job.steps):
        inputs = side.prepare(batches[i % BATCHES])
        start = time.perf_counter()
        losses.append(float(side.step(i, inputs)))  # also waits for the device
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    return StepMeasurement(statistics.mean(seconds[job.warmup :]), peak, losses[0], side.flops)


class _Ours:
    """The training step as `mmssl train` makes it, half-way through the schedule of the objectives."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.accelerator = build_accelerator(config)
        plan = build.resolve(config)
        self.schedules = plan.objectives
        words = build.build_tokenizer(plan, folder / TOKENIZER)
        torch.manual_seed(torch_seed(config.seed, "weights"))
        encoder = build.build_encoder(config, words)
        encoder.load_state_dict(load_file(folder / WEIGHTS))
        self.task = build.build_task(plan.objectives, encoder, words, World())
        # Counted on a separate task: counting runs steps, which change queues and statistics.
        self.flops = predicted_cost(build.build_task(plan.objectives, encoder, words, World()), list(self.schedules))
        encoder.zero_grad()
        self.task.to(self.accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        compile_towers(encoder, config)
        self.optimizer = build_optimizer(self.task.named_parameters(), config.optim)
        self.model, self.prepared = self.accelerator.prepare(self.task, self.optimizer)
        self.model.train()

    def prepare(self, batch: Batch) -> Batch:
        """As the stream hands it out."""
        return batch

    def step(self, number: int, inputs: Batch) -> Tensor:
        """One update; returns the weighted loss."""
        weights = {name: mixing.weight_at(options, number, 0.5) for name, options in self.schedules.items()}
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        micro_batch = self.config.train.micro_batch
        assert micro_batch != "auto"
        seed = (self.config.seed, "step", number)
        tally = backward(
            self.model,
            Step(self.task, inputs.to(self.accelerator.device), weights, 0.5, seed, micro_batch),
            self.accelerator,
        )
        update(self.accelerator, self.task, self.optimizer, self.prepared, self.config.optim.clip_norm)
        parts = [w * tally.sums[f"{n}.loss"][0] / tally.sums[f"{n}.loss"][1].clamp(min=1) for n, w in weights.items()]
        return torch.stack(parts).sum()


def _ratio(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def check_peer(config: Config) -> None:
    """Refuse towers that open_clip cannot build.

    Raises:
        UserError: says which.
    """
    if not config.model.vision.name.startswith("open_clip:"):
        raise UserError(
            f"model.vision.name={config.model.vision.name!r}: open_clip is measured beside towers of its own; "
            f"use open_clip:MODEL, for example open_clip:ViT-B-32, or --no-peer"
        )
    if config.model.text.config is None:
        raise UserError(
            "model.text.config is missing; open_clip is given a tower of this configuration; or use --no-peer"
        )
