"""Who makes the parts of a batch: the caller itself, threads, or processes; the order is the plan's."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmssl.data.assemble import Assembler, Part, Task, Watch
from mmssl.data.plan import Position
from mmssl.data.reader import LocalFiles
from mmssl.types import UserError

Cuts = list[tuple[int, int]]
"""The parts of a batch: first sample and end of each, in the global batch."""
Wait = Callable[[], list[Part]]
"""Waits for the parts of a batch that were requested."""


class Workers(Protocol):
    """Makes the parts of one batch after another."""

    watch: Watch

    def request(self, position: Position) -> Wait:
        """Begin the batch at `position`. Requests are made, and then waited for, in the order of the plan."""

    def close(self) -> None:
        """Stop working and free everything."""


def cut(start: int, stop: int, depth: int, workers: int) -> Cuts:
    """Cut a rank's samples [start, stop) of a batch of lanes `depth` samples deep: whole lanes where there
    are enough."""
    bounds = [start + (stop - start) * worker // workers for worker in range(workers + 1)]
    if stop - start >= workers * depth:
        bounds = [start, *(min(max(round(b / depth) * depth, start), stop) for b in bounds[1:-1]), stop]
    return [(a, b) for a, b in pairwise(bounds) if a < b]


class Inline:
    """No workers: parts are made where they are waited for."""

    def __init__(self, assembler: Assembler, batch_size: int, cuts: Cuts) -> None:
        self.watch = Watch(1)
        self._assembler = assembler
        self._batch_size = batch_size
        self._cuts = cuts
        self._files = LocalFiles()

    def request(self, position: Position) -> Wait:
        """The work is done when the result is called."""
        tasks = [Task(position, self._batch_size, start, stop) for start, stop in self._cuts]
        return lambda: [self._assembler.part(task, self._files, self.watch.row(0)) for task in tasks]

    def close(self) -> None:
        """Close the files."""
        self._files.close()


class Threads:
    """One thread for each part; decoding and resizing release Python's lock."""

    def __init__(self, assembler: Assembler, batch_size: int, cuts: Cuts) -> None:
        self.watch = Watch(len(cuts))
        self._assembler = assembler
        self._batch_size = batch_size
        self._cuts = cuts
        self._files = [LocalFiles() for _ in cuts]
        # One pool a part: a part's files are then used by one thread only.
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"mmssl-part-{i}") for i in range(len(cuts))]
        threads = torch.get_num_threads()
        for pool in self._pools:
            pool.submit(_use_one_core).result()
        torch.set_num_threads(threads)

    def request(self, position: Position) -> Wait:
        """Queue the parts of a batch."""
        tasks = [Task(position, self._batch_size, start, stop) for start, stop in self._cuts]
        futures = [
            pool.submit(self._assembler.part, task, files, self.watch.row(worker))
            for worker, (pool, task, files) in enumerate(zip(self._pools, tasks, self._files, strict=True))
        ]
        return lambda: [future.result() for future in futures]

    def close(self) -> None:
        """Drop what is queued and join the threads."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool, files in zip(self._pools, self._files, strict=True):
            pool.shutdown(wait=True)
            files.close()


def _use_one_core() -> None:
    """Keep torch from starting a team of threads inside this one. Reading the number back makes it stick."""
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1


class Processes:
    """One process for each part, started afresh (spawn), so that Python's lock stays with the training
    loop."""

    def __init__(
        self, assembler: Assembler, batch_size: int, cuts: Cuts, first: Position, ahead: int
    ) -> None:
        self.watch = Watch(len(cuts))
        self._count = len(cuts)
        loader = DataLoader(
            _Parts(assembler, batch_size, cuts, first, self.watch),
            batch_size=None,
            num_workers=len(cuts),
            collate_fn=_same,
            prefetch_factor=ahead,
            multiprocessing_context="spawn",
        )
        self._parts: Iterator[Part | UserError] | None = iter(loader)

    def request(self, position: Position) -> Wait:
        """The processes go on by themselves; waiting takes the next part of each."""
        return self._take

    def close(self) -> None:
        """End the processes."""
        self._parts = None

    def _take(self) -> list[Part]:
        assert self._parts is not None
        taken = []
        for _ in range(self._count):
            part = next(self._parts)
            if isinstance(part, UserError):
                raise part
            taken.append(part)
        return taken


class _Parts(IterableDataset[Part | UserError]):
    """The parts of one worker process, batch after batch."""

    def __init__(
        self, assembler: Assembler, batch_size: int, cuts: Cuts, first: Position, watch: Watch
    ) -> None:
        self._assembler = assembler
        self._batch_size = batch_size
        self._cuts = cuts
        self._first = first
        self._watch = watch

    def __iter__(self) -> Iterator[Part | UserError]:
        info = get_worker_info()
        assert info is not None
        start, stop = self._cuts[info.id]
        plan, files, watch = self._assembler.plan, LocalFiles(), self._watch.row(info.id)
        position = self._first
        while True:
            position = plan.start(position, self._batch_size)
            try:
                yield self._assembler.part(Task(position, self._batch_size, start, stop), files, watch)
            except UserError as error:
                # As a value: an exception would reach the parent wrapped in a traceback.
                yield error
                return
            position = plan.after(position, self._batch_size)


def _same(part: Any) -> Any:
    return part
