"""The gradient of one step: exactly that of the global batch, for any micro-batch and number of processes."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.models import batch_norm
from mmssl.objectives import Output, TrainingTask, base, mixing
from mmssl.rng import RowRandom, torch_generator, torch_seed
from mmssl.types import Batch


@dataclass
class Tally:
    """Sums and counts by name, added up on the device over micro-batches, then over processes."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add a sum and the number of terms in it."""
        if not isinstance(count, Tensor):
            count = torch.full((), float(count), device=total.device)
        pair = torch.stack([total.detach().float(), count.float()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def stacked(self) -> Tensor:
        """Float32 [names, 2], in order of first addition."""
        return torch.stack(list(self.sums.values()))


@dataclass(frozen=True)
class Step:
    """Inputs of one training step."""

    task: TrainingTask
    batch: Batch
    """This process's part of the global batch, on the device; equally large on every process."""
    weights: Mapping[str, float]
    """Objective -> weight; inactive objectives are absent."""
    fraction: float
    """Fraction of the training done, 0 to 1."""
    seed: tuple[int | str, ...]
    """Key of the randomness of this step."""
    micro_batch: int | None = None
    """Samples whose activations are held at a time; None: all."""

    @property
    def start(self) -> int:
        """Position of this process's first sample in the global batch."""
        return self.task.world.rank * len(self.batch)

    def random(self, name: str) -> RowRandom:
        """The randomness of one objective."""
        rows, world = len(self.batch), self.task.world
        generator = torch_generator(*self.seed, "objective", name, device=self.batch.tokens.device)
        return RowRandom(generator, self.start, self.start + rows, rows * world.size)

    def reseed(self, row: int) -> None:
        """Seed dropout and drop-path for the samples from `row` of the batch, so that both passes draw the same."""
        torch.manual_seed(torch_seed(*self.seed, "dropout", self.start + row))

    def chunks(self) -> list[tuple[int, int]]:
        """Bounds of the micro-batches."""
        rows = len(self.batch)
        size = self.micro_batch or rows
        return [(a, min(a + size, rows)) for a in range(0, rows, size)]


def backward(
    model: nn.Module, step: Step, accelerator: Any, diagnose: Callable[[base.Inputs], None] | None = None
) -> Tally:
    """Add the gradient of the weighted total over the global batch to the parameters.

    Args:
        model: `step.task` as prepared by Accelerate.
        diagnose: called with the step's inputs once the gradient is computed.

    Returns: each objective's loss and metrics on this process, as sums and counts.
    """
    task, weights = step.task, step.weights
    step.reseed(0)
    with accelerator.autocast():
        inputs = task.inputs(step.batch, weights, step.random, step.fraction)
    tally = Tally()
    active = _count(task, inputs, weights, tally)
    chunks = step.chunks()
    cached = _cache_gradients(model, step, inputs, active, accelerator, tally) if len(chunks) > 1 else {}
    for a, b in chunks:
        step.reseed(a)
        with nullcontext() if b == len(step.batch) else accelerator.no_sync(model):
            with accelerator.autocast():
                total, outputs = model(_rows(inputs, a, b), active, _cached_rows(cached, a, b))
            with batch_norm.kept_statistics(task):  # activation checkpointing runs the blocks again
                accelerator.backward(total)
        _record(tally, outputs)
    if diagnose is not None:
        diagnose(inputs)
    task.on_step_end(inputs, weights)
    return tally


def _count(
    task: TrainingTask, inputs: base.Inputs, weights: Mapping[str, float], tally: Tally
) -> dict[str, mixing.Weighted]:
    """Count the terms of each objective's loss: those of this process for the tally, those of all for the means."""
    counts = torch.stack([task.objective(name).num_terms(inputs) for name in weights])
    for name, count in zip(weights, counts, strict=True):
        tally.add(f"{name}.loss", torch.zeros_like(count), count)
    everyone = task.world.sum(counts).clamp(min=1)
    return {
        name: mixing.Weighted(weight, task.world.size / count)
        for (name, weight), count in zip(weights.items(), everyone, strict=True)
    }


def _cache_gradients(
    model: nn.Module,
    step: Step,
    inputs: base.Inputs,
    active: Mapping[str, mixing.Weighted],
    accelerator: Any,
    tally: Tally,
) -> dict[str, base.Predictions]:
    """First pass of GradCache (Gao et al. 2021): gradients of batch-coupled losses with respect to predictions."""
    task, chunks = step.task, step.chunks()
    batch_coupled = {name: weighted for name, weighted in active.items() if task.objective(name).batch_coupled}
    if not batch_coupled:
        return {}
    parts = []
    for a, b in chunks:
        step.reseed(a)
        with torch.no_grad(), accelerator.autocast(), batch_norm.kept_statistics(task):
            # Through the wrapped module, which may have to gather the weights first.
            parts.append(model(_rows(inputs, a, b), batch_coupled, only_predict=True))
    leaves = {
        name: {key: _join([part[name][key] for part in parts]) for key in parts[0][name]} for name in batch_coupled
    }
    total, outputs = task.losses(leaves, inputs, batch_coupled)
    torch.autograd.backward(total)
    _record(tally, outputs)
    return {name: {key: _gradient(leaf, len(chunks)) for key, leaf in kept.items()} for name, kept in leaves.items()}


def _join(parts: list[Tensor]) -> Tensor:
    joined = parts[0] if parts[0].ndim == 0 else torch.cat(parts)
    return joined.float().detach().requires_grad_()


def _gradient(leaf: Tensor, chunks: int) -> Tensor:
    if leaf.grad is None:
        return torch.zeros_like(leaf)
    # A scalar's gradient is handed out once per micro-batch.
    return leaf.grad / chunks if leaf.ndim == 0 else leaf.grad


def _rows(inputs: base.Inputs, a: int, b: int) -> base.Inputs:
    return {name: tensor[a:b] for name, tensor in inputs.items()}


def _cached_rows(cached: Mapping[str, base.Predictions], a: int, b: int) -> mixing.Cached:
    return {n: {k: g if g.ndim == 0 else g[a:b] for k, g in kept.items()} for n, kept in cached.items()}


def _record(tally: Tally, outputs: Mapping[str, Output]) -> None:
    for name, output in outputs.items():
        tally.add(f"{name}.loss", output.total, 0.0)
        for metric, (total, count) in output.metrics.items():
            tally.add(f"{name}.{metric}", total, count)
