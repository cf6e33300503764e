"""`train.micro_batch: auto`: how many samples fit into memory with their activations."""

import copy
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from mmssl import system
from mmssl.objectives._task import TrainingTask
from mmssl.train.cost import synthetic_batch
from mmssl.train.step import backward

SHARE = 0.7
"""Of the memory that is left beside weights, gradients and optimizer, activations may take so much; the rest is for
what comes and goes inside a layer."""
PROBE = 4
"""Activations are counted on so many samples."""


def fit_micro_batch(
    task: TrainingTask,
    rows: int,
    tokens: int,
    weights: Mapping[str, float],
    accelerator: Accelerator,
    free_bytes: int | None = None,
) -> tuple[int, str]:
    """The largest power of two (or all `rows`) whose activations fit, the same on every process, and why, in words.

    Args:
        mixer: on its device, before it is prepared.
        rows: samples of a step on this process.
        tokens: length of the longest captions.
        weights: the objectives that may act together.
        free_bytes: memory that may be used. Default: what this process's device has free.
    """
    device = accelerator.device
    # Steps change queues and running statistics.
    task = copy.deepcopy(task)

    def saved(count: int) -> int:
        with _Counter() as counter:
            _one_step(task, count, tokens, weights, accelerator)
        task.zero_grad()
        return counter.most

    a_sample = max(1, (saved(PROBE) - saved(PROBE // 2)) // (PROBE - PROBE // 2))
    free = free_memory(device) if free_bytes is None else free_bytes
    free -= sum(3 * p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    fits = max(1, int(free * SHARE) // a_sample)
    fits = min(rows, 1 << (fits.bit_length() - 1))
    everyone = task.world.gather(torch.tensor([fits], device=device))[0]
    fits = _largest_that_runs(int(everyone.min()), lambda n: _trial(task, n, tokens, weights, accelerator))
    return fits, f"{a_sample / 2**20:.1f} MiB a sample, {max(free, 0) / 2**30:.1f} GiB free: {fits} of {rows}"


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on its device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return system.available_memory() // system.local_world_size()


def _largest_that_runs(count: int, trial: Callable[[int], None]) -> int:
    """`count`, halved until a step with so many samples does not run out of memory."""
    while count > 1:
        try:
            trial(count)
            return count
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            count //= 2
    return count


def _trial(task: TrainingTask, count: int, tokens: int, weights: Mapping[str, float], accelerator: Accelerator) -> None:
    # A CPU that runs out of memory kills the process: only a GPU can be asked by trying. With several processes, each
    # would have to try alike.
    if accelerator.device.type == "cuda" and task.world.size == 1:
        try:
            _one_step(task, count, tokens, weights, accelerator)
        finally:
            task.zero_grad()


def _one_step(
    task: TrainingTask, count: int, tokens: int, weights: Mapping[str, float], accelerator: Accelerator
) -> None:
    # Of ordinary tokens: masked words take memory too.
    batch = synthetic_batch(task, weights, count, tokens)
    backward(task, task, batch, weights, 0.5, (0, "fit"), None, accelerator)


class _Counter:
    """While entered, counts the bytes of the tensors that graphs keep for their backward pass."""

    def __init__(self) -> None:
        self.most = 0
        self._held: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._held[storage.data_ptr()] = storage.nbytes()
        self.most = sum(self._held.values())
        return tensor

    def __enter__(self) -> "_Counter":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
