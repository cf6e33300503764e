"""Shards without an index, read from their beginning to their end: no plan, no exact resume, no count.

Every lane reads whole shards, in another order each pass, and mixes the last samples read with webdataset's
buffer.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray

from mmssl.data.loading.parts import BAD_IN_A_ROW, BatchPart, PartTask, Render, compose
from mmssl.data.order.epoch import shuffled
from mmssl.data.order.plan import STATE_VERSION, Mixture, Position
from mmssl.data.shards.samples import BadSample, SampleLimits
from mmssl.data.storage.fetch import Fetcher
from mmssl.data.storage.files import Access, Files
from mmssl.data.storage.sequential import read_shard
from mmssl.errors import UserError
from mmssl.rng import torch_seed
from mmssl.types import Sample

BUFFER = 1_000
"""Samples that a lane mixes."""
_UNKNOWN = (
    "the number of samples is unknown, for the shards have no index; run `mmssl shards index` on them, "
    "or set the length in train.steps"
)
NOT_PROMISED = (
    "%d shards have no index (first: %s) and are read from beginning to end: the order changes with the number of "
    "processes, samples repeat or miss after a resume, an epoch has no length; `mmssl shards index` mends that"
)
Found = tuple[Sample | BadSample, int]
"""A sample or what was wrong with it, and the pass over the shards."""


class UnindexedPlan:
    """Where batches begin and end when nothing is known of the shards but their names."""

    def __init__(self, sources: Sequence[Sequence[str]], seed: int, lanes: int) -> None:
        self.lanes = lanes
        self._names = repr([[Path(shard).name for shard in source] for source in sources])
        self.seed = seed

    def check(self, batch_size: int) -> None:
        """Refuse a batch that the lanes do not divide."""
        if batch_size % self.lanes:
            raise UserError(
                f"data.batch_size={batch_size} is not divisible by the stream's {self.lanes} lanes; use a multiple"
            )

    @property
    def samples(self) -> int:
        """Raises UserError: nobody knows."""
        raise UserError(_UNKNOWN)

    def batches_per_epoch(self, batch_size: int) -> int:
        """Raises UserError: nobody knows."""
        raise UserError(_UNKNOWN)

    def start(self, position: Position, batch_size: int) -> Position:
        """Batches follow each other."""
        return position

    def after(self, position: Position, batch_size: int) -> Position:
        """Where the batch that begins at `position` ends."""
        return Position(position.epoch, position.depth + batch_size // self.lanes)

    def resume(self, position: Position) -> Position:
        """A new beginning with another order: where the lanes stood is not known."""
        return Position(position.epoch + 1, 0) if position.depth > 0 else position

    def state(self, position: Position) -> dict[str, int | str]:
        """The position as JSON."""
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "lanes": self.lanes,
            "epoch": position.epoch,
            "depth": position.depth,
        }

    def position(self, state: Mapping[str, Any]) -> Position:
        """The position a state stands for."""
        return Position(int(state["epoch"]), int(state["depth"]))


def unindexed_lanes(sources: Sequence[Sequence[str]], batch_size: int, world_size: int, lanes: int | None) -> int:
    """Lanes that each have a shard of every source, and of which each process has as many.

    Raises:
        UserError: there are none, or the lanes asked for are not such.
    """
    most = min(len(shards) for shards in sources)
    fitting = [n for n in range(world_size, min(64, most) + 1, world_size) if batch_size % n == 0]
    if lanes is not None and lanes % world_size == 0 and lanes <= most:
        return lanes
    if lanes is not None or not fitting:
        raise UserError(
            f"{most} shards without an index cannot be read by {world_size} processes in {lanes or 'any number of'} "
            "lanes: the lanes must be a multiple of the processes and no more than the shards; run `mmssl shards index`"
        )
    return fitting[-1]


class UnindexedBuilder:
    """Makes parts of batches from shards without an index. Each part's lanes are read by one worker only."""

    def __init__(
        self,
        plan: UnindexedPlan,
        sources: Sequence[Sequence[str]],
        weights: Sequence[float],
        render: Render,
        limits: SampleLimits,
        access: Access,
    ) -> None:
        self.plan = plan
        self.access = access
        self.shards = [shard for source in sources for shard in source]
        self._sources = sources
        self._render = render
        self._limits = limits
        self._mixture = Mixture(weights)

    def part(self, task: PartTask, files: Files, watch: NDArray[np.int64]) -> BatchPart:
        """Read and render a task's samples; a bad one gives way to the next of its lane.

        Raises:
            UserError: a shard is out of reach, or 100 samples in a row were bad.
        """
        depth = task.batch_size // self.plan.lanes
        assert task.start % depth == task.stop % depth == 0, "lanes are not split between workers"
        making, retries = _UnindexedBuild(self._render, watch), files.retries
        for lane in range(task.start // depth, task.stop // depth):
            stop = task.position.depth + depth
            for source in self._mixture.sources(lane, task.position.depth, stop).tolist():
                making.add(self._stream(files, source, lane, task.position.epoch, watch), source)
        part = making.part(len(self._sources))
        part.retries = files.retries - retries
        return part

    def _stream(self, files: Files, source: int, lane: int, epoch: int, watch: NDArray[np.int64]) -> Iterator[Found]:
        """The samples of a source's shards that a lane reads, for ever."""
        if (source, lane) not in files.streams:
            words = (self.plan.seed, source, "lane", epoch, lane)
            mix = webdataset.shuffle(BUFFER, initial=BUFFER // 4, rng=random.Random(torch_seed(*words)))
            files.streams[source, lane] = mix(self._samples(files.fetcher, source, lane, epoch, watch))
        return files.streams[source, lane]

    def _samples(
        self, fetcher: Fetcher, source: int, lane: int, epoch: int, watch: NDArray[np.int64]
    ) -> Iterator[Found]:
        shards = self._sources[source]
        before = sum(map(len, self._sources[:source]))
        while True:
            order = shuffled(len(shards), self.plan.seed, source, "shards", epoch)
            for shard in order[lane :: self.plan.lanes].tolist():
                # Nothing counts these samples: their ids are drawn from their names.
                number = partial(torch_seed, shards[shard])
                watch[:2] = before + shard, 0
                for found, end in read_shard(shards[shard], self._limits, fetcher, number):
                    yield found, epoch
                    # Set anew each time: the worker's other lanes have read in between.
                    watch[:2] = before + shard, end
            epoch += 1


class _UnindexedBuild:
    """One part in the making."""

    def __init__(self, render: Render, watch: NDArray[np.int64]) -> None:
        self._render = render
        self._watch = watch
        self._streams: list[Iterator[Found]] = []
        self._sources: list[int] = []
        self._samples: list[tuple[Sample, int]] = []
        self._bad: list[tuple[int, BadSample]] = []

    def add(self, stream: Iterator[Found], source: int) -> None:
        """Take the next sample of a stream."""
        self._streams.append(stream)
        self._sources.append(source)
        self._samples.append(self._next(len(self._samples)))

    def part(self, sources: int) -> BatchPart:
        """Render what was added; what fails gives way to the next sample of its stream."""
        pieces = []
        slots = list(range(len(self._samples)))
        for _ in range(BAD_IN_A_ROW):
            failed: list[int] = []
            for epoch in sorted({self._samples[slot][1] for slot in slots}):
                own = [slot for slot in slots if self._samples[slot][1] == epoch]
                rendered = self._render([self._samples[slot][0] for slot in own], epoch)
                errors = dict(rendered.bad)
                for row, error in errors.items():
                    sample = self._samples[own[row]][0]
                    self._bad.append((own[row], BadSample(sample.shard, sample.key, error)))
                rows = [row for row in range(len(own)) if row not in errors]
                pieces.append(([own[row] for row in rows], rows, rendered))
                failed += [own[row] for row in errors]
            if not failed:
                break
            slots = sorted(failed)
            for slot in slots:
                self._samples[slot] = self._next(slot)
        else:
            raise _too_many(self._bad[-1][1])
        samples = [sample for sample, _ in self._samples]
        views, augment_params, texts = compose(pieces, len(samples))
        return BatchPart(
            views,
            augment_params,
            texts,
            ids=[sample.id for sample in samples],
            keys=[f"{sample.shard}:{sample.key}" for sample in samples],
            sources=[self._sources.count(source) for source in range(sources)],
            bytes=sum(len(sample.image) for sample in samples),
            bad=sorted(self._bad, key=lambda bad: bad[0]),
        )

    def _next(self, slot: int) -> tuple[Sample, int]:
        for _ in range(BAD_IN_A_ROW):
            self._watch[2] = time.monotonic_ns()
            found, epoch = next(self._streams[slot])
            self._watch[2] = 0
            if isinstance(found, Sample):
                return found, epoch
            self._bad.append((slot, found))
        raise _too_many(self._bad[-1][1])


def _too_many(bad: BadSample) -> UserError:
    return UserError(
        f"{BAD_IN_A_ROW} samples in a row could not be used, the last one {bad.key!r} of {bad.shard} ({bad.error}); "
        "check the shards"
    )
