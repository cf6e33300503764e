"""Workers that build the parts of a batch: the caller itself, threads or processes. The plan fixes the order."""

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Event
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmssl import system
from mmssl.data.loading.parts import BatchPart, PartBuilder, PartTask
from mmssl.data.loading.unindexed import UnindexedBuilder
from mmssl.data.order import Position
from mmssl.errors import UserError

Builder = PartBuilder | UnindexedBuilder
Wait = Callable[[], list[BatchPart]]
"""Waits for the requested parts of a batch."""


def split_tasks(task: PartTask, depth: int, workers: int) -> list[PartTask]:
    """Split a rank's samples between workers: complete lanes of `depth` samples where there are enough."""
    start, count = task.start, task.stop - task.start
    bounds = [start + count * worker // workers for worker in range(workers + 1)]
    if count >= workers * depth:
        inner = (min(max(round(b / depth) * depth, start), task.stop) for b in bounds[1:-1])
        bounds = [start, *inner, task.stop]
    return [PartTask(task.batch_size, a, b) for a, b in pairwise(bounds) if a < b]


class Workers(ABC):
    """Builds the parts of one batch after another, one worker per task."""

    def __init__(self, builder: Builder, tasks: list[PartTask]) -> None:
        self.builder = builder
        self.tasks = tasks
        self.reading: Tensor = torch.zeros(len(tasks), 3, dtype=torch.int64)
        """Shard number, byte and start (monotonic nanoseconds, 0 when idle) of each worker's read, int64 [workers, 3].
        In shared memory, so that the training process sees it."""
        self.reading.share_memory_()  # type: ignore[no-untyped-call]

    @abstractmethod
    def request(self, position: Position) -> Wait:
        """Start the batch at `position`. Requests are made, and waited for, in the order of the plan."""

    @abstractmethod
    def close(self) -> None:
        """Stop working and free everything."""

    @abstractmethod
    def abandon(self) -> None:
        """Stop working, without waiting for reads that are under way."""


class InlineWorkers(Workers):
    """No workers: parts are built in the caller, when they are waited for."""

    def __init__(self, builder: Builder, tasks: list[PartTask]) -> None:
        super().__init__(builder, tasks)
        self._files = [builder.access.open(len(tasks), row.numpy()) for row in self.reading]

    def request(self, position: Position) -> Wait:
        """The parts are built by calling the result."""
        pairs = list(zip(self.tasks, self._files, strict=True))
        return lambda: [self.builder.part(position, task, files) for task, files in pairs]

    def close(self) -> None:
        """Close the files."""
        for files in self._files:
            files.close()

    def abandon(self) -> None:
        """Resume no read that breaks off, and start none."""
        for files in self._files:
            files.abandon()


class ThreadWorkers(InlineWorkers):
    """One thread per part; decoding and resizing release Python's lock."""

    def __init__(self, builder: Builder, tasks: list[PartTask]) -> None:
        super().__init__(builder, tasks)
        # One pool per part: the files of a part are then used by one thread only.
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"mmssl-part-{i}") for i in range(len(tasks))]
        threads = torch.get_num_threads()
        for pool in self._pools:
            pool.submit(_use_one_core).result()
        torch.set_num_threads(threads)

    def request(self, position: Position) -> Wait:
        """Queue the parts of a batch."""
        futures = [
            pool.submit(self.builder.part, position, task, files)
            for pool, task, files in zip(self._pools, self.tasks, self._files, strict=True)
        ]
        return lambda: [future.result() for future in futures]

    def close(self) -> None:
        """Drop queued parts, join the threads and close the files."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for files in self._files:
            files.stop()
        for pool in self._pools:
            pool.shutdown(wait=True)
        super().close()

    def abandon(self) -> None:
        """Drop queued parts."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        super().abandon()


def _use_one_core() -> None:
    """Keep torch from starting more threads inside this one. Reading the number back makes it take effect."""
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1


class ProcessWorkers(Workers):
    """One spawned process per part, so that Python's lock stays with the training loop."""

    def __init__(self, builder: Builder, tasks: list[PartTask], first: Position, ahead: int) -> None:
        super().__init__(builder, tasks)
        self._ended = get_context("spawn").Event()
        loader = DataLoader(
            _Parts(builder, tasks, first, self.reading, self._ended),
            batch_size=None,
            num_workers=len(tasks),
            collate_fn=_same,
            prefetch_factor=ahead,
            multiprocessing_context="spawn",
        )
        self._parts: Iterator[BatchPart | UserError] | None = iter(loader)

    def request(self, position: Position) -> Wait:
        """The processes work ahead by themselves; waiting takes the next part of each."""
        return self._take

    def close(self) -> None:
        """End the processes, at once: they only read."""
        self._ended.set()
        self._parts = None

    def abandon(self) -> None:
        """As `close`."""
        self.close()

    def _take(self) -> list[BatchPart]:
        assert self._parts is not None
        taken = []
        for _ in self.tasks:
            part = next(self._parts)
            if isinstance(part, UserError):
                raise part
            taken.append(part)
        return taken


class _Parts(IterableDataset[BatchPart | UserError]):
    """The parts of one worker process, batch after batch."""

    def __init__(self, builder: Builder, tasks: list[PartTask], first: Position, reading: Tensor, ended: Event) -> None:
        self._ended = ended
        self._builder = builder
        self._tasks = tasks
        self._first = first
        self._reading = reading

    def __iter__(self) -> Iterator[BatchPart | UserError]:
        info = get_worker_info()
        assert info is not None
        # Terminals and schedulers signal these processes too; training needs them until it has saved.
        for request in system.stop_signals():
            signal.signal(request, signal.SIG_IGN)
        for wait in (self._ended.wait, _wait_for_parent):
            threading.Thread(target=_end_after, args=(wait,), daemon=True).start()
        task, plan = self._tasks[info.id], self._builder.plan
        files = self._builder.access.open(reading=self._reading[info.id].numpy())
        position = self._first
        while True:
            position = plan.start(position, task.batch_size)
            try:
                yield self._builder.part(position, task, files)
            except UserError as error:
                # As a value: an exception would reach the parent wrapped in a traceback.
                yield error
                return
            position = plan.after(position, task.batch_size)


def _end_after(wait: Callable[[], object]) -> None:
    """End this process after a wait, also in the middle of a read that stalls."""
    wait()
    os._exit(0)


def _wait_for_parent() -> None:
    """Return when the training process is gone, however it ended."""
    parent = parent_process()
    assert parent is not None
    parent.join()


def _same(part: Any) -> Any:
    return part
