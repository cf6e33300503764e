"""The order of the training samples, a pure function of integers.

The state of the stream is an epoch and a depth: all lanes are at the same depth.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.data.order.batching import Batching, TableOrder
from mmssl.data.order.epoch import EpochOrder, Slices
from mmssl.errors import UserError

Ints = NDArray[np.int64]

_MAX_PATTERN = 4096
STATE_VERSION = 1
_MEANING = {
    "version": "its state was written by another version of mmssl",
    "fingerprint": "the shards, the weights, data.slice_mib, data.shuffle_block, data.hold_out or data.batching (with "
    "distinct also data.batch_size) changed; restore them",
    "seed": "the seed changed; restore it",
    "lanes": "data.lanes changed; restore it",
}


def default_lanes(batch_size: int) -> int:
    """The largest divisor of the batch up to 64."""
    return max(lanes for lanes in range(1, 65) if batch_size % lanes == 0)


def check_lanes(batch_size: int, lanes: int) -> None:
    """Raises UserError when the lanes do not divide the batch."""
    if batch_size % lanes:
        raise UserError(
            f"data.batch_size={batch_size} is not divisible by the stream's {lanes} lanes; use a multiple of {lanes}"
        )


@dataclass(frozen=True)
class PlannedSource:
    """A source as the plan sees it."""

    slices: Slices
    weight: float
    fingerprint: str
    unit: int = 1
    """Slices per shuffling unit."""
    batching: Batching | None = None
    """A choice of the samples that share a batch, which then orders the source in place of slices and blocks."""

    def with_batching(self, batching: Batching) -> "PlannedSource":
        """The source in an order that is chosen for its batches."""
        return replace(self, batching=batching, fingerprint=f"{self.fingerprint}+{batching.fingerprint}")

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.slices.samples


@dataclass(frozen=True)
class Position:
    """A position of the stream: the next batch starts at `depth` of every lane."""

    epoch: int = 0
    depth: int = 0


@dataclass(frozen=True)
class SampleRun:
    """Consecutive depths [start, stop) in a lane of a source, within one epoch of that source."""

    source: int
    epoch: int
    lane: int
    start: int
    stop: int
    slots: Ints
    """Their rows in the part of the batch, int64 [stop - start]."""


class StreamPlan:
    """The order of the stream: the samples of every batch of every epoch."""

    def __init__(self, sources: Sequence[PlannedSource], *, seed: int, lanes: int, block: int) -> None:
        self.sources = tuple(sources)
        self.lanes = lanes
        self._seed = seed
        self._block = block
        self.group = max((source.batching.group for source in sources if source.batching is not None), default=1)
        self._mixture = Mixture([source.weight for source in sources], self.group) if len(sources) > 1 else None
        self._lane_lengths = [source.samples // lanes // self.group * self.group for source in sources]
        self.order = lru_cache(2 * len(sources))(self._order)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(StreamPlan, seed=self._seed, lanes=self.lanes, block=self._block), (self.sources,)

    @property
    def samples(self) -> int:
        """Number of usable samples of all sources."""
        return sum(source.samples for source in self.sources)

    @property
    def lane_length(self) -> int:
        """Depth of an epoch: samples of all sources per lane, rounded down to whole groups."""
        return self.samples // self.lanes // self.group * self.group

    def check(self, batch_size: int) -> None:
        """Raises UserError when the data cannot fill a batch with different samples."""
        check_lanes(batch_size, self.lanes)
        depth = batch_size // self.lanes
        if depth % self.group:
            raise UserError(
                f"data.batch_size={batch_size} in {self.lanes} lanes is not a multiple of groups of {self.group} "
                f"neighbours; use a multiple of {self.lanes * self.group}, or fewer data.lanes"
            )
        for source, length in enumerate(self._lane_lengths):
            most = depth if self._mixture is None else self._max_count(source, depth)
            if length < most or length == 0:
                raise UserError(
                    f"data.batch_size={batch_size} takes {most * self.lanes} samples of a source that has "
                    f"{self.sources[source].samples}; make the batch smaller"
                )

    def batches_per_epoch(self, batch_size: int) -> int:
        """Complete batches per epoch; an epoch of a mixture has as many samples as all its sources."""
        return self.lane_length // (batch_size // self.lanes)

    def start(self, position: Position, batch_size: int) -> Position:
        """The start of the next batch. A single source drops the tail of its epoch; a mixture has no tail."""
        depth = batch_size // self.lanes
        if self._mixture is not None:
            extra, rest = divmod(position.depth, self.lane_length)
            return Position(position.epoch + extra, rest)
        return position if position.depth + depth <= self.lane_length else Position(position.epoch + 1, 0)

    def after(self, position: Position, batch_size: int) -> Position:
        """The end of the batch that begins at `position`; in a mixture it may be in the next epoch."""
        end = Position(position.epoch, position.depth + batch_size // self.lanes)
        return end if self._mixture is None else self.start(end, batch_size)

    def resume(self, position: Position) -> Position:
        """The position to resume at: exactly this one."""
        return position

    def runs(self, position: Position, batch_size: int, start: int, stop: int) -> list[SampleRun]:
        """Samples [start, stop) of the global batch that begins at `position`; slots count from `start`.

        The batch is lane-major: lane 0's next samples, then lane 1's, and so on.
        """
        depth = batch_size // self.lanes
        found: list[SampleRun] = []
        for lane in range(start // depth, -(-stop // depth)):
            low, high = max(start, lane * depth), min(stop, (lane + 1) * depth)
            first = position.depth + low - lane * depth
            found.extend(self._lane_runs(lane, position.epoch, first, np.arange(low - start, high - start)))
        return found

    def ids(self, run: SampleRun) -> Ints:
        """Sample numbers of a run within its source, int64 [stop - start]."""
        return self.order(run.source, run.epoch).addresses(run.lane, run.start, run.stop)

    def stand_ins(self, run: SampleRun, depth: int, most: int) -> Iterator[int]:
        """Sample numbers to replace the one at `depth`: half a block away, so rarely in the same batch."""
        ids, place = self.order(run.source, run.epoch).block(run.lane, depth)
        length = self._lane_lengths[run.source]
        for step in range(min(most, len(ids) - 1)):
            yield int(ids[(place + 1 + (len(ids) // 2 + step) % (len(ids) - 1)) % len(ids)])
        for step in range(len(ids), min(most + 1, length * self.lanes)):
            lanes, other = divmod(depth - place + step, length)
            lane = (run.lane + lanes) % self.lanes
            yield int(self.order(run.source, run.epoch).addresses(lane, other, other + 1)[0])

    def state(self, position: Position) -> dict[str, int | str]:
        """The position as integers, with the fingerprint of the data and the order they refer to."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self._seed,
            "lanes": self.lanes,
            "epoch": position.epoch,
            "depth": position.depth,
        }

    def position(self, state: Mapping[str, Any]) -> Position:
        """The position of a state.

        Raises:
            UserError: the state belongs to other data, another seed or another order.
        """
        if "fingerprint" not in state:
            raise UserError(
                "the stream cannot be resumed: its state was written when the shards had no index; start a new run"
            )
        for key, own in self.state(Position()).items():
            if key not in ("epoch", "depth") and state.get(key) != own:
                raise UserError(f"the stream cannot be resumed: {_MEANING[key]} ({state.get(key)} then, {own} now)")
        epoch, depth = state.get("epoch"), state.get("depth")
        if not (isinstance(epoch, int) and isinstance(depth, int) and epoch >= 0 <= depth <= self.lane_length):
            raise UserError(f"the stream cannot be resumed: its state is damaged (epoch {epoch}, depth {depth})")
        return Position(epoch, depth)

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE2b-64 of the data and the order's parameters."""
        digest = hashlib.blake2b(repr(self._block).encode(), digest_size=8)
        for source in self.sources:
            digest.update(repr((source.fingerprint, source.weight, source.unit)).encode())
            digest.update(source.slices.bounds[:-1].astype("<i8", copy=False).data)
        return digest.hexdigest()

    def _order(self, source: int, epoch: int) -> EpochOrder | TableOrder:
        planned = self.sources[source]
        words = (self._seed, source, epoch)
        if planned.batching is not None:
            return TableOrder(planned.batching.table(words, self.lanes))
        return EpochOrder(planned.slices, words, self.lanes, self._block * planned.unit)

    def _lane_runs(self, lane: int, epoch: int, first: int, slots: Ints) -> Iterator[SampleRun]:
        if self._mixture is None:
            yield SampleRun(0, epoch, lane, first, first + len(slots), slots)
            return
        begin = epoch * self.lane_length + first
        picked = self._mixture.sources(lane, begin, begin + len(slots))
        for source, length in enumerate(self._lane_lengths):
            own, done = slots[picked == source], self._mixture.count(source, lane, begin)
            while len(own) > 0:
                source_epoch, start = divmod(done, length)
                count = min(len(own), length - start)
                yield SampleRun(source, source_epoch, lane, start, start + count, own[:count])
                own, done = own[count:], done + count

    def _max_count(self, source: int, depth: int) -> int:
        assert self._mixture is not None
        length = len(self._mixture.pattern)
        before = [self._mixture.count(source, 0, slot) for slot in range(length + depth + 1)]
        return max(before[slot + depth] - before[slot] for slot in range(length + 1))


class Mixture:
    """The source at each depth of a lane: a repeated pattern of T slots, with exact fractions in every lane.

    Lane l starts at slot l mod T, so that a row across the lanes is also close to the fractions. With `group`, a slot
    is that many samples of one source.
    """

    def __init__(self, weights: Sequence[float], group: int = 1) -> None:
        quotas = _quotas(weights)
        centres = [((slot + 0.5) / quota, source) for source, quota in enumerate(quotas) for slot in range(quota)]
        self._group = group
        self.pattern = np.repeat(np.array([source for _, source in sorted(centres)], dtype=np.int64), group)
        is_source = self.pattern[None] == np.arange(len(quotas))[:, None]
        self._before = np.concatenate([np.zeros((len(quotas), 1), np.int64), np.cumsum(is_source, axis=1)], axis=1)

    def count(self, source: int, lane: int, depth: int) -> int:
        """The number of times `source` is read in the first `depth` depths of a lane."""
        shift = lane * self._group % len(self.pattern)
        return self._prefix(source, depth + shift) - self._prefix(source, shift)

    def sources(self, lane: int, start: int, stop: int) -> Ints:
        """The source at each depth of [start, stop)."""
        return self.pattern[(np.arange(start, stop) + lane * self._group) % len(self.pattern)]

    def _prefix(self, source: int, slots: int) -> int:
        rounds, rest = divmod(slots, len(self.pattern))
        return rounds * int(self._before[source, -1]) + int(self._before[source, rest])


def _quotas(weights: Sequence[float]) -> list[int]:
    """Integers in proportion to the weights: exact if their sum is at most 4,096, else the nearest of that sum."""
    # From the decimal digits: 0.3 is 3/10, not the nearest binary fraction.
    exact = [Fraction(repr(float(weight))) for weight in weights]
    fractions = [weight / sum(exact) for weight in exact]
    length = lcm(*(fraction.denominator for fraction in fractions))
    if length <= _MAX_PATTERN:
        return [int(fraction * length) for fraction in fractions]
    quotas = [max(1, int(fraction * _MAX_PATTERN)) for fraction in fractions]
    by_remainder = sorted(range(len(fractions)), key=lambda i: quotas[i] - fractions[i] * _MAX_PATTERN)
    for source in by_remainder[: max(0, _MAX_PATTERN - sum(quotas))]:
        quotas[source] += 1
    return quotas
