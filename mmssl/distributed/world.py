"""Communication between ranks. Without an initialised process group there is one rank and every call is a no-op.

A `World` is a plain value that is passed on, so that code which needs it can be built and tested in one process.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmssl import system


@dataclass(frozen=True)
class World:
    """The ranks of this run, which share each global batch. Every rank calls the same methods in the same order."""

    rank: int = 0
    """This process, from 0."""
    size: int = 1
    """Number of processes."""
    equal_batches: bool = False
    """All ranks have the same number of rows in each exchange, so they need not exchange the numbers first."""
    ring: bool = False
    """Losses send features round the ranks one part at a time instead of gathering all of them."""

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """All ranks' rows [n, ...] in rank order [N, ...], and the index of this rank's first row. n may differ.

        Differentiable: the gradient of a rank's rows is the sum of the gradients from every rank's loss.
        """
        if self.size == 1:
            return rows, 0
        sizes = [len(rows)] * self.size if self.equal_batches else self._sizes(rows)
        gathered: Tensor = _Gather.apply(rows, sizes, self.rank)
        return gathered, sum(sizes[: self.rank])

    def ring_shift(self, *rows: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Begin to send tensors of n rows each to the previous rank of the ring.

        Calling the result waits for the m rows of the next rank. Carries no gradient.
        """
        if self.size == 1:
            return lambda: rows
        count = torch.tensor([len(rows[0])], device=rows[0].device)
        arriving = len(rows[0]) if self.equal_batches else int(self._swap([count], 1)()[0])
        return self._swap(rows, arriving)

    def logsumexp(self, x: Tensor) -> Tensor:
        """Elementwise log of the sum over ranks of exp(x). Differentiable, as `gather`."""
        if self.size == 1:
            return x
        result: Tensor = _LogSumExp.apply(x)
        return result

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks, the same on each. Carries no gradient."""
        return x.detach() if self.size == 1 else _sum(x.detach())

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """`value` of rank `source` on every rank. It travels as JSON; nothing is unpickled."""
        if self.size == 1:
            return value
        device = _message_device()
        text = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor(len(text), device=device)
        dist.broadcast(length, source)
        message = torch.zeros(int(length), dtype=torch.uint8, device=device)
        if self.rank == source:
            message.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(message, source)
        return json.loads(bytes(message.tolist()))

    def barrier(self) -> None:
        """Return once every rank has called it."""
        if self.size > 1:
            dist.barrier()

    def _swap(self, leaving: Sequence[Tensor], count: int) -> Callable[[], tuple[Tensor, ...]]:
        """Send to the previous rank, receive `count` rows per tensor from the next; calling the result waits."""
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        sent = [x.contiguous() for x in leaving]
        received = tuple(x.new_empty(count, *x.shape[1:]) for x in leaving)
        messages = [dist.P2POp(dist.isend, x, before) for x in sent]
        messages += [dist.P2POp(dist.irecv, x, after) for x in received]
        return partial(_await, dist.batch_isend_irecv(messages), sent, received)

    def _sizes(self, rows: Tensor) -> list[int]:
        sizes = torch.empty(self.size, dtype=torch.int64, device=rows.device)
        dist.all_gather_into_tensor(sizes, torch.tensor([len(rows)], device=rows.device))
        return [int(size) for size in sizes.tolist()]


SINGLE_PROCESS = World()
"""One process holds the whole batch."""


def current_world(equal_batches: bool = False, ring: bool = False) -> World:
    """The ranks of the initialised process group; a single rank without one."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), equal_batches, ring)
    return SINGLE_PROCESS


@contextmanager
def process_group() -> Iterator[World]:
    """Connect the processes that a launcher such as torchrun started, on the CPU, until the end of the block.

    Without a launcher this is a single process.
    """
    if system.world_size() == 1:
        yield SINGLE_PROCESS
        return
    dist.init_process_group("gloo")
    try:
        yield current_world()
    finally:
        dist.destroy_process_group()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered on every rank, if FSDP2 sharded it (a collective call); otherwise the tensor itself."""
    sharded = _as_sharded(tensor)
    if sharded is None:
        return tensor
    full: Tensor = sharded.full_tensor()
    return full


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard, in the same memory, if FSDP2 sharded the tensor; otherwise the tensor itself."""
    sharded = _as_sharded(tensor)
    if sharded is None:
        return tensor
    own: Tensor = sharded.to_local()
    return own


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor, equal on all ranks, into `target`, which FSDP2 may have sharded."""
    sharded = _as_sharded(target)
    if sharded is not None:
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), sharded.device_mesh, sharded.placements)
    target.copy_(value)


def _as_sharded(tensor: Tensor) -> Any:
    """The tensor as a DTensor; None if it is not sharded."""
    # DTensor takes seconds to import, and exists in process groups only.
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def _await(works: Sequence[dist.Work], sent: list[Tensor], received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Wait, and return `received`. The argument `sent` keeps its tensors alive until then."""
    for work in works:
        work.wait()
    return received


def _message_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _sum(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format).to(_tensor_device(x))
    dist.all_reduce(total)
    return total.to(x.device)


def _tensor_device(x: Tensor) -> torch.device:
    """The device that a tensor is sent from. NCCL cannot send from a CPU."""
    return _message_device() if x.device.type == "cpu" else x.device


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        longest = max(sizes)
        padded = rows.contiguous()
        if len(rows) < longest:
            padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        gathered = rows.new_empty(len(sizes) * longest, *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, padded)
        if min(sizes) == longest:
            return gathered
        return torch.cat([gathered[r * longest : r * longest + size] for r, size in enumerate(sizes)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        start = sum(ctx.sizes[: ctx.rank])
        return _sum(gradient)[start : start + ctx.sizes[ctx.rank]], None, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        largest = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        result = largest + _sum((x - largest).exp()).log()
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x: Tensor
        result: Tensor
        x, result = ctx.saved_tensors
        return _sum(gradient) * (x - result).exp()
