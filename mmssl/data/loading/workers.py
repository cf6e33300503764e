"""Who makes the parts of a batch: the caller itself, threads, or processes; the order is the plan's."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmssl.data.loading.parts import BatchPart, PartTask, ReadMonitor
from mmssl.data.order.plan import Position
from mmssl.data.storage.files import Access, Files
from mmssl.errors import UserError

Cuts = list[tuple[int, int]]
"""The parts of a batch: first sample and end of each, in the global batch."""
Wait = Callable[[], list[BatchPart]]
"""Waits for the parts of a batch that were requested."""


class BatchPositions(Protocol):
    """Where batches begin and end."""

    def start(self, position: Position, batch_size: int) -> Position:
        """Where the next batch begins."""

    def after(self, position: Position, batch_size: int) -> Position:
        """Where the batch that begins at `position` ends."""


class Builder(Protocol):
    """Makes parts: an `PartBuilder` by a plan, a `Streamer` without one."""

    @property
    def plan(self) -> BatchPositions:
        """Where batches begin and end."""

    @property
    def access(self) -> Access:
        """How shards are reached."""

    def part(self, task: PartTask, files: Files, watch: NDArray[np.int64]) -> BatchPart:
        """Read and render a task's samples."""


class Workers(Protocol):
    """Makes the parts of one batch after another."""

    watch: ReadMonitor

    def request(self, position: Position) -> Wait:
        """Begin the batch at `position`. Requests are made, and then waited for, in the order of the plan."""

    def close(self) -> None:
        """Stop working and free everything."""


def split_tasks(start: int, stop: int, depth: int, workers: int) -> Cuts:
    """Cut a rank's samples [start, stop) of a batch of lanes `depth` samples deep: whole lanes where there
    are enough."""
    bounds = [start + (stop - start) * worker // workers for worker in range(workers + 1)]
    if stop - start >= workers * depth:
        bounds = [start, *(min(max(round(b / depth) * depth, start), stop) for b in bounds[1:-1]), stop]
    return [(a, b) for a, b in pairwise(bounds) if a < b]


class InlineWorkers:
    """No workers: parts are made where they are waited for."""

    def __init__(self, maker: Builder, batch_size: int, cuts: Cuts) -> None:
        self.watch = ReadMonitor(1)
        self._maker = maker
        self._batch_size = batch_size
        self._cuts = cuts
        self._files = maker.access.open()

    def request(self, position: Position) -> Wait:
        """The work is done when the result is called."""
        tasks = [PartTask(position, self._batch_size, start, stop) for start, stop in self._cuts]
        return lambda: [self._maker.part(task, self._files, self.watch.row(0)) for task in tasks]

    def close(self) -> None:
        """Close the files."""
        self._files.close()


class ThreadWorkers:
    """One thread for each part; decoding and resizing release Python's lock."""

    def __init__(self, maker: Builder, batch_size: int, cuts: Cuts) -> None:
        self.watch = ReadMonitor(len(cuts))
        self._maker = maker
        self._batch_size = batch_size
        self._cuts = cuts
        self._files = [maker.access.open(len(cuts)) for _ in cuts]
        # One pool a part: a part's files are then used by one thread only.
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"mmssl-part-{i}") for i in range(len(cuts))]
        threads = torch.get_num_threads()
        for pool in self._pools:
            pool.submit(_use_one_core).result()
        torch.set_num_threads(threads)

    def request(self, position: Position) -> Wait:
        """Queue the parts of a batch."""
        tasks = [PartTask(position, self._batch_size, start, stop) for start, stop in self._cuts]
        futures = [
            pool.submit(self._maker.part, task, files, self.watch.row(worker))
            for worker, (pool, task, files) in enumerate(zip(self._pools, tasks, self._files, strict=True))
        ]
        return lambda: [future.result() for future in futures]

    def close(self) -> None:
        """Drop what is queued and join the threads."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for files in self._files:
            files.stop()
        for pool, files in zip(self._pools, self._files, strict=True):
            pool.shutdown(wait=True)
            files.close()


def _use_one_core() -> None:
    """Keep torch from starting a team of threads inside this one. Reading the number back makes it stick."""
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1


class ProcessWorkers:
    """One process for each part, started afresh (spawn), so that Python's lock stays with the training
    loop."""

    def __init__(self, maker: Builder, batch_size: int, cuts: Cuts, first: Position, ahead: int) -> None:
        self.watch = ReadMonitor(len(cuts))
        self._count = len(cuts)
        loader = DataLoader(
            _Parts(maker, batch_size, cuts, first, self.watch),
            batch_size=None,
            num_workers=len(cuts),
            collate_fn=_same,
            prefetch_factor=ahead,
            multiprocessing_context="spawn",
        )
        self._parts: Iterator[BatchPart | UserError] | None = iter(loader)

    def request(self, position: Position) -> Wait:
        """The processes go on by themselves; waiting takes the next part of each."""
        return self._take

    def close(self) -> None:
        """End the processes."""
        self._parts = None

    def _take(self) -> list[BatchPart]:
        assert self._parts is not None
        taken = []
        for _ in range(self._count):
            part = next(self._parts)
            if isinstance(part, UserError):
                raise part
            taken.append(part)
        return taken


class _Parts(IterableDataset[BatchPart | UserError]):
    """The parts of one worker process, batch after batch."""

    def __init__(self, maker: Builder, batch_size: int, cuts: Cuts, first: Position, watch: ReadMonitor) -> None:
        self._maker = maker
        self._batch_size = batch_size
        self._cuts = cuts
        self._first = first
        self._watch = watch

    def __iter__(self) -> Iterator[BatchPart | UserError]:
        info = get_worker_info()
        assert info is not None
        # A terminal and a scheduler signal these processes too; the training needs them until it has saved.
        for request in (signal.SIGINT, signal.SIGTERM):
            signal.signal(request, signal.SIG_IGN)
        start, stop = self._cuts[info.id]
        plan, files, watch = self._maker.plan, self._maker.access.open(), self._watch.row(info.id)
        position = self._first
        while True:
            position = plan.start(position, self._batch_size)
            try:
                yield self._maker.part(PartTask(position, self._batch_size, start, stop), files, watch)
            except UserError as error:
                # As a value: an exception would reach the parent wrapped in a traceback.
                yield error
                return
            position = plan.after(position, self._batch_size)


def _same(part: Any) -> Any:
    return part
