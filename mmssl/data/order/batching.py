"""Orders that decide which samples share a batch: groups of neighbours together, or equal values apart.

Both are pure functions of integers, as any order, and are computed for a whole epoch: 8 bytes per sample in memory.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmssl.data.order.epoch import shuffled
from mmssl.rng import Word

Ints = NDArray[np.int64]


class Batching(Protocol):
    """A choice of the samples that share a batch."""

    @property
    def group(self) -> int:
        """Samples that stay together: the depth of a batch in a lane is a multiple of this."""

    @property
    def fingerprint(self) -> str:
        """Changes when the order does."""

    def table(self, words: Sequence[Word], lanes: int) -> Ints:
        """The sample numbers of the lanes of an epoch, int64 [lanes, depth], keyed by `words`."""


@dataclass(frozen=True)
class NeighbourGroups:
    """Groups of neighbours as units of the shuffle. Each is in one batch."""

    line: Ints
    """All samples of the source, int64 [N]. Each `group` of them in turn are neighbours; the last N mod group, of which
    no group is full, take the places of other samples, in each epoch of other ones."""
    group: int

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE2b-64 of the groups."""
        digest = hashlib.blake2b(repr(("neighbours", self.group)).encode(), digest_size=8)
        digest.update(self.line.astype("<i8").tobytes())
        return digest.hexdigest()

    def table(self, words: Sequence[Word], lanes: int) -> Ints:
        """As `Batching`. Lanes have the same number of whole groups; fewer than `lanes` groups are left out."""
        count = len(self.line) // self.group
        groups, rest = self.line[: count * self.group].reshape(count, self.group), self.line[count * self.group :]
        if len(rest) > 0 and count > 0:
            groups = groups.copy()
            taken = np.resize(shuffled(count, *words, "left over"), len(rest))
            # Different places, so that a group that two of them enter keeps both.
            groups[taken, shuffled(self.group, *words, "places")[: len(rest)]] = rest
        per_lane = count // lanes
        return groups[shuffled(count, *words, "groups")[: per_lane * lanes]].reshape(lanes, per_lane * self.group)


@dataclass(frozen=True)
class DistinctValues:
    """Samples with equal values in different batches, as far as an epoch has enough batches."""

    values: Ints
    """A number for each sample of the source, equal for equal values, int64 [N]."""
    batch_size: int
    group: int = 1

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE2b-64 of the values and the size of a batch, on which the order depends."""
        digest = hashlib.blake2b(repr(("distinct", self.batch_size)).encode(), digest_size=8)
        digest.update(self.values.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def batches(self) -> int:
        """Batches per epoch."""
        return len(self.values) // self.batch_size

    def repeats(self) -> int:
        """Most samples of an epoch that share a batch with an equal value before them. No order has fewer."""
        counts = np.unique(self.values, return_counts=True)[1]
        return int(np.maximum(counts - self.batches, 0).sum())

    def describe(self) -> str:
        """One line about the values, and about those that are too frequent to be apart."""
        counts = np.unique(self.values, return_counts=True)[1]
        found = f"{len(self.values):,} samples have {len(counts):,} different values"
        if self.repeats() == 0:
            return f"{found}; no batch holds a value twice"
        return (
            f"{found}; {int((counts > self.batches).sum()):,} of them have more samples than an epoch has batches "
            f"({self.batches:,}), so up to {self.repeats():,} samples of an epoch share a batch with an equal one"
        )

    def table(self, words: Sequence[Word], lanes: int) -> Ints:
        """As `Batching`: samples ordered by value are dealt out to the batches in turn, one to each.

        So a value with m samples is ceil(m / batches) times in a batch at most. Values are in random order, and so are
        batches. The depths behind the last batch hold the samples that the epoch leaves out.
        """
        order = shuffled(len(self.values), *words, "samples")
        used, rest = np.split(order, [self.batches * self.batch_size])
        _, first, value = np.unique(self.values[used], return_index=True, return_inverse=True)
        by_value = used[np.argsort(first[value], kind="stable")]
        dealt = by_value.reshape(self.batch_size, self.batches).T[shuffled(self.batches, *words, "batches")]
        in_lanes = dealt.reshape(self.batches, lanes, -1).transpose(1, 0, 2).reshape(lanes, -1)
        behind = len(self.values) // lanes - in_lanes.shape[1]
        return np.concatenate([in_lanes, rest[: behind * lanes].reshape(lanes, behind)], axis=1)


class TableOrder:
    """The order of one source in one epoch, held in memory. Its methods are those of `EpochOrder`; each lane is one
    block."""

    def __init__(self, lanes: Ints) -> None:
        self._lanes = lanes

    def addresses(self, lane: int, start: int, stop: int) -> Ints:
        """Sample numbers at depths [start, stop) of a lane, int64 [stop - start]."""
        found: Ints = self._lanes[lane, start:stop]
        return found

    def block(self, lane: int, depth: int) -> tuple[Ints, int]:
        """The sample numbers of the lane, and the position of `depth` among them."""
        return self._lanes[lane], depth

    def block_number(self, lane: int, depth: int) -> int:
        """The block of the lane that contains the sample at `depth`."""
        assert 0 <= depth < self._lanes.shape[1], f"depth {depth} is outside of lane {lane}"
        return 0

    def block_samples(self, lane: int, first: int, last: int) -> Ints:
        """The sample numbers of the lane."""
        return self.block(lane, 0)[0]
