"""One step's gradient: of the whole global batch, exactly, whatever the micro-batch and the number of processes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.objectives._base import Inputs, Output, Predictions
from mmssl.objectives._task import Cached, TrainingTask, Weighted
from mmssl.rng import RowRandom, torch_generator, torch_seed
from mmssl.types import Batch


@dataclass
class Tally:
    """Sums and counts by name, added up over micro-batches on the device, then over processes."""

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


def backward(
    model: nn.Module,
    task: TrainingTask,
    batch: Batch,
    weights: Mapping[str, float],
    progress: float,
    seed: tuple[int | str, ...],
    micro_batch: int | None,
    accelerator: Any,
    watch: Callable[[Inputs], None] | None = None,
) -> Tally:
    """Add the gradient of the weighted total over the global batch to the parameters.

    Args:
        model: `mixer` as prepared by Accelerate.
        batch: this process's part, of the same size on every process, on the device.
        weights: objective -> weight; those that rest are absent.
        progress: the part of the training that is done, 0 to 1.
        seed: words that key this step's randomness.
        micro_batch: samples held with their activations at a time; None: all.
        watch: is given what the step was computed from, once its gradient is there.

    Returns: each objective's loss and metrics on this process, as sums and counts.
    """
    world = task.world
    rows = len(batch)
    start = world.rank * rows

    def random(name: str) -> RowRandom:
        generator = torch_generator(*seed, "objective", name, device=batch.tokens.device)
        return RowRandom(generator, start, start + rows, rows * world.size)

    _reseed(seed, start)
    with accelerator.autocast():
        inputs = task.inputs(batch, weights, random, progress)
    tally = Tally()
    active = _count(task, inputs, weights, tally)
    chunks = list(_chunks(rows, micro_batch))
    cached: dict[str, Predictions] = {}
    if len(chunks) > 1:
        cached = _cache_gradients(model, task, inputs, active, chunks, start, seed, accelerator, tally)
    for a, b in chunks:
        last = b == rows
        _reseed(seed, start + a)
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                total, outputs = model(_rows(inputs, a, b), active, _cached_rows(cached, a, b))
            accelerator.backward(total)
        _record(tally, outputs)
    if watch is not None:
        watch(inputs)
    task.on_step_end(inputs, weights)
    return tally


def _count(task: TrainingTask, inputs: Inputs, weights: Mapping[str, float], tally: Tally) -> dict[str, Weighted]:
    """Count the terms of each objective's loss: on this process into the tally, over all to make means of sums."""
    counts = torch.stack([task.objective(name).num_terms(inputs) for name in weights])
    for name, count in zip(weights, counts, strict=True):
        tally.add(f"{name}.loss", torch.zeros_like(count), count)
    everyone = task.world.sum(counts).clamp(min=1)
    return {
        name: Weighted(weight, task.world.size / count)
        for (name, weight), count in zip(weights.items(), everyone, strict=True)
    }


def _cache_gradients(
    model: nn.Module,
    task: TrainingTask,
    inputs: Inputs,
    active: Mapping[str, Weighted],
    chunks: list[tuple[int, int]],
    start: int,
    seed: tuple[int | str, ...],
    accelerator: Any,
    tally: Tally,
) -> dict[str, Predictions]:
    """First pass of GradCache (Gao et al. 2021): coupled objectives' gradients with respect to their predictions."""
    batch_coupled = {name: weighted for name, weighted in active.items() if task.objective(name).batch_coupled}
    if not batch_coupled:
        return {}
    parts = []
    for a, b in chunks:
        _reseed(seed, start + a)
        with torch.no_grad(), accelerator.autocast():
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


def _chunks(rows: int, size: int | None) -> Iterator[tuple[int, int]]:
    for a in range(0, rows, size or rows):
        yield a, min(a + (size or rows), rows)


def _rows(inputs: Inputs, a: int, b: int) -> Inputs:
    return {name: tensor[a:b] for name, tensor in inputs.items()}


def _cached_rows(cached: Mapping[str, Predictions], a: int, b: int) -> Cached:
    return {n: {k: g if g.ndim == 0 else g[a:b] for k, g in kept.items()} for n, kept in cached.items()}


def _reseed(seed: tuple[int | str, ...], position: int) -> None:
    """Dropout and drop-path of the samples from `position` in the global batch draw the same in both passes."""
    torch.manual_seed(torch_seed(*seed, "dropout", position))


def _record(tally: Tally, outputs: Mapping[str, Output]) -> None:
    for name, output in outputs.items():
        tally.add(f"{name}.loss", output.total, 0.0)
        for metric, (total, count) in output.metrics.items():
            tally.add(f"{name}.{metric}", total, count)
