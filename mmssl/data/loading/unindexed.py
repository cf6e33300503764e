"""Shards without an index, read from beginning to end: no plan, no exact resume, no sample count.

Every lane reads complete shards, in a different order on each pass, and shuffles their samples through a buffer.
"""

import random
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmssl.data.loading.parts import BAD_IN_A_ROW, BatchPart, PartAssembly, PartTask, Render
from mmssl.data.order import Mixture, Position, shuffled
from mmssl.data.order.plan import STATE_VERSION, check_lanes
from mmssl.data.shards import BadSample, SampleLimits
from mmssl.data.storage import Access, Fetcher, Files, read_shard
from mmssl.errors import UserError
from mmssl.rng import torch_seed
from mmssl.types import Sample

BUFFER = 1_000
"""Samples in the shuffle buffer of a lane."""
_UNKNOWN = (
    "the number of samples is unknown because the shards have no index; set the length in train.steps, or run "
    "`mmssl shards index` where the shards are stored (the output of a pipe: command has no index: write it to files)"
)
NO_INDEX_WARNING = (
    "%d shards have no index (first: %s) and are read from beginning to end: the order changes with the number of "
    "processes, a resume repeats or skips samples, and epochs have no length; run `mmssl shards index` to fix this"
)
Found = tuple[Sample | BadSample, int]
"""A sample or a bad one, and the pass over the shards."""
T = TypeVar("T")


class UnindexedPlan:
    """Positions of batches when only the names of the shards are known."""

    def __init__(self, seed: int, lanes: int) -> None:
        self.seed = seed
        self.lanes = lanes

    def check(self, batch_size: int) -> None:
        """Raises UserError when the lanes do not divide the batch."""
        check_lanes(batch_size, self.lanes)

    @property
    def samples(self) -> int:
        """Raises UserError: the number is unknown."""
        raise UserError(_UNKNOWN)

    def batches_per_epoch(self, batch_size: int) -> int:
        """Raises UserError: the number is unknown."""
        raise UserError(_UNKNOWN)

    def start(self, position: Position, batch_size: int) -> Position:
        """The start of the next batch: batches follow each other without gaps."""
        return position

    def after(self, position: Position, batch_size: int) -> Position:
        """The end of the batch that begins at `position`."""
        return Position(position.epoch, position.depth + batch_size // self.lanes)

    def resume(self, position: Position) -> Position:
        """The next epoch, in a new order: the positions within the shards are not stored."""
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
        """The position of a state."""
        return Position(int(state["epoch"]), int(state["depth"]))


def unindexed_lanes(sources: Sequence[Sequence[str]], batch_size: int, world_size: int, lanes: int | None) -> int:
    """The number of lanes: each lane has a shard of every source, and each process the same number of lanes.

    Raises:
        UserError: no such number exists, or `lanes` is not one.
    """
    shard_count = min(len(shards) for shards in sources)
    fitting = [n for n in range(world_size, min(64, shard_count) + 1, world_size) if batch_size % n == 0]
    if lanes is not None and lanes % world_size == 0 and lanes <= shard_count:
        return lanes
    if lanes is not None or not fitting:
        raise UserError(
            f"{shard_count} shards without an index cannot be read by {world_size} processes in "
            f"{lanes or 'any number of'} lanes: the lanes must be a multiple of the processes and no more than the "
            "shards; run `mmssl shards index`"
        )
    return fitting[-1]


class UnindexedBuilder:
    """Builds parts from shards without an index. Each lane is read by one worker only."""

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

    def part(self, position: Position, task: PartTask, files: Files) -> BatchPart:
        """Read and render a task's samples; a bad one is replaced by the next of its lane.

        Raises:
            UserError: a shard is out of reach, or 100 samples in a row were bad.
        """
        depth = task.batch_size // self.plan.lanes
        assert task.start % depth == task.stop % depth == 0, "lanes are not split between workers"
        retries, stop = files.retries, position.depth + depth
        read = [
            (source, lane)
            for lane in range(task.start // depth, task.stop // depth)
            for source in self._mixture.sources(lane, position.depth, stop).tolist()
        ]
        streams = [self._stream(files, source, lane, position.epoch) for source, lane in read]
        assembly, epochs = PartAssembly(self._render, len(streams)), [0] * len(streams)
        missing = list(range(len(streams)))
        for _ in range(BAD_IN_A_ROW):
            for slot in missing:
                assembly.samples[slot], epochs[slot] = _next_sample(streams[slot], slot, assembly, files)
            failed: dict[int, BadSample] = {}
            for epoch in sorted({epochs[slot] for slot in missing}):
                failed |= assembly.render(epoch, [slot for slot in missing if epochs[slot] == epoch])
            if not failed:
                break
            assembly.bad += failed.items()
            missing = sorted(failed)
        else:
            raise _too_many(assembly.bad[-1][1])
        counts = [sum(source == own for source, _ in read) for own in range(len(self._sources))]
        read_bytes = sum(len(sample.image) for sample in assembly.samples if sample is not None)
        return assembly.finish(counts, read_bytes, files.retries - retries)

    def _stream(self, files: Files, source: int, lane: int, epoch: int) -> Iterator[Found]:
        """The samples of a source's shards that a lane reads, shuffled, without end."""
        if (source, lane) not in files.streams:
            rng = random.Random(torch_seed(self.plan.seed, source, "lane", epoch, lane))
            samples = self._samples(files.fetcher, files.reading, source, lane, epoch)
            files.streams[source, lane] = shuffle_buffer(samples, rng)
        return files.streams[source, lane]

    def _samples(
        self, fetcher: Fetcher, reading: NDArray[np.int64], source: int, lane: int, epoch: int
    ) -> Iterator[Found]:
        shards = self._sources[source]
        before = sum(map(len, self._sources[:source]))
        while True:
            order = shuffled(len(shards), self.plan.seed, source, "shards", epoch)
            for shard in order[lane :: self.plan.lanes].tolist():
                # The samples are not numbered: their ids are hashes of their names.
                number = partial(torch_seed, shards[shard])
                reading[:2] = before + shard, 0
                for found, end in read_shard(shards[shard], self._limits, fetcher, number):
                    yield found, epoch
                    # Set again after each sample: other lanes of this worker have read in between.
                    reading[:2] = before + shard, end
            epoch += 1


def shuffle_buffer(samples: Iterator[T], rng: random.Random) -> Generator[T, None, None]:
    """Shuffle a stream through a buffer, in the same order as `webdataset.shuffle(BUFFER, initial=BUFFER // 4)`."""
    buffer: list[T] = []
    for sample in samples:
        buffer.append(sample)
        if len(buffer) < BUFFER:
            # Two in for each one out, until the buffer is full.
            buffer.extend(islice(samples, 1))
        if len(buffer) >= BUFFER // 4:
            yield _pop_random(buffer, rng)
    while buffer:
        yield _pop_random(buffer, rng)


def _pop_random(buffer: list[T], rng: random.Random) -> T:
    place = rng.randint(0, len(buffer) - 1)
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def _next_sample(stream: Iterator[Found], slot: int, assembly: PartAssembly, files: Files) -> tuple[Sample, int]:
    """The next good sample of a stream and its pass over the shards; bad ones are recorded."""
    for _ in range(BAD_IN_A_ROW):
        files.reading[2] = time.monotonic_ns()
        found, epoch = next(stream)
        files.reading[2] = 0
        if isinstance(found, Sample):
            return found, epoch
        assembly.bad.append((slot, found))
    raise _too_many(assembly.bad[-1][1])


def _too_many(bad: BadSample) -> UserError:
    return UserError(
        f"{BAD_IN_A_ROW} samples in a row could not be used, the last one {bad.key!r} of {bad.shard} ({bad.error}); "
        "check the shards"
    )
