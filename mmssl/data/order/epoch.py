"""The order of one source in one epoch.

A slice is a run of neighbouring samples of one shard. An epoch permutes the slices of a source and joins them to one
sequence of samples, which is divided into lanes of equal length. A lane shuffles blocks of a few consecutive slices.
So the sample at any depth of any lane is computed, not stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmssl.rng import Word, generator

Ints = NDArray[np.int64]

SHUFFLE_UNIT = 8 << 20
"""Bytes per shuffling unit; blocks are counted in these units."""
_SINGLE = 64 << 20
"""Sources of at most this many bytes are shuffled sample by sample."""


def shuffled(count: int, *words: Word) -> Ints:
    """A permutation of range(count) keyed by `words`.

    Sorts raw Philox output, which NumPy promises never to change, unlike its `permutation`.
    """
    bits = generator(*words).bit_generator
    raw = bits.random_raw(count) if count > 0 else np.empty(0, dtype=np.uint64)
    return np.argsort(raw, kind="stable").astype(np.int64)


def default_slice_bytes(total: int, remote: bool = False) -> int:
    """Slice size in bytes for a source of `total` bytes: single samples up to 64 MiB, then a millionth of the source.

    At least 16 KiB, mostly still a single sample, and at most 8 MiB. Remote sources have about 4,096 slices of 4 to
    8 MiB, to limit the number of requests.
    """
    if total <= _SINGLE:
        return 1
    return min(8 << 20, max(total >> 12, 4 << 20) if remote else max(total >> 20, 16 << 10))


@dataclass(frozen=True)
class Slices:
    """Runs of neighbouring samples, int64 [M] each."""

    first: Ints
    """Number of the first sample in the source."""
    length: Ints

    def unit(self, total: int) -> int:
        """Slices per shuffling unit, in a source of `total` bytes."""
        return max(1, SHUFFLE_UNIT * len(self.first) // total)

    @staticmethod
    def cut(counts: Sequence[int], sizes: Sequence[int], slice_bytes: int) -> "Slices":
        """Cut shards of `counts` samples and `sizes` bytes into equal runs of about `slice_bytes`."""
        samples = np.asarray(counts, dtype=np.int64)
        pieces = -(-np.asarray(sizes, dtype=np.int64) // slice_bytes)
        pieces = np.minimum(np.maximum(pieces, 1), samples)
        shard = np.repeat(np.arange(len(samples)), pieces)
        number = np.arange(len(shard)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = samples[shard] * number // pieces[shard]
        stop = samples[shard] * (number + 1) // pieces[shard]
        return Slices((np.cumsum(samples) - samples)[shard] + begin, stop - begin)


class EpochOrder:
    """The order of one source in one epoch."""

    def __init__(self, slices: Slices, words: tuple[Word, ...], lanes: int, block: int) -> None:
        permutation = shuffled(len(slices.length), *words, "slices")
        self._first = slices.first[permutation]
        self._bounds = np.concatenate([[0], np.cumsum(slices.length[permutation])])
        self._words = words
        self._lanes = lanes
        self._block = block
        self._block_ids = lru_cache(2 * lanes)(self._block_ids_of)

    def addresses(self, lane: int, start: int, stop: int) -> Ints:
        """Sample numbers at depths [start, stop) of a lane, int64 [stop - start]."""
        pieces = []
        while start < stop:
            ids, offset = self.block(lane, start)
            piece = ids[offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def block(self, lane: int, depth: int) -> tuple[Ints, int]:
        """The sample numbers of the block that contains `depth`, in order, and the position of `depth` among them."""
        begin, _ = self._lane(lane)
        number = self.block_number(lane, depth)
        low = max(begin, int(self._bounds[self._slice_at(begin) + number * self._block]))
        return self._block_ids(lane, number), begin + depth - low

    def block_number(self, lane: int, depth: int) -> int:
        """The block of the lane that contains the sample at `depth`."""
        begin, stop = self._lane(lane)
        assert 0 <= depth < stop - begin, f"depth {depth} is outside of lane {lane}"
        return (self._slice_at(begin + depth) - self._slice_at(begin)) // self._block

    def block_samples(self, lane: int, first: int, last: int) -> Ints:
        """The sample numbers of blocks `first` to `last` of a lane, or to its end."""
        begin, stop = self._lane(lane)
        final = (self._slice_at(stop - 1) - self._slice_at(begin)) // self._block
        return np.concatenate([self._block_ids(lane, number) for number in range(first, min(last, final) + 1)])

    def _lane(self, lane: int) -> tuple[int, int]:
        total = int(self._bounds[-1])
        return total * lane // self._lanes, total * (lane + 1) // self._lanes

    def _slice_at(self, position: int) -> int:
        return int(np.searchsorted(self._bounds, position, side="right")) - 1

    def _block_ids_of(self, lane: int, number: int) -> Ints:
        begin, stop = self._lane(lane)
        head = self._slice_at(begin) + number * self._block
        tail = min(head + self._block, len(self._first))
        # A slice on the border of two lanes is split between them.
        low = np.maximum(self._bounds[head:tail], begin)
        high = np.minimum(self._bounds[head + 1 : tail + 1], stop)
        length = np.maximum(high - low, 0)
        first = self._first[head:tail] + low - self._bounds[head:tail]
        ids = np.repeat(first - (np.cumsum(length) - length), length) + np.arange(int(length.sum()))
        return ids[shuffled(len(ids), *self._words, "block", lane, number)]
