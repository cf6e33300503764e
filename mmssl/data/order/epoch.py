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
_MARK = 64
"""Slices between two positions that an order keeps."""
_TOGETHER = 1 << 12
"""Shards that are cut at a time, and kept positions that are computed at a time: arrays in between stay small."""


def shuffled(count: int, *words: Word) -> Ints:
    """A permutation of range(count) keyed by `words`.

    Sorts raw Philox output, which NumPy promises never to change, unlike its `permutation`.
    """
    bits = generator(*words).bit_generator
    raw = bits.random_raw(count) if count > 0 else np.empty(0, dtype=np.uint64)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


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
    """Runs of neighbouring samples that follow each other through a source."""

    bounds: Ints
    """Number of the first sample of each of M slices, and the number of samples, int64 [M + 1]."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def samples(self) -> int:
        """Number of samples of all slices."""
        return int(self.bounds[-1])

    def unit(self, total: int) -> int:
        """Slices per shuffling unit, in a source of `total` bytes."""
        return max(1, SHUFFLE_UNIT * len(self) // total)

    @staticmethod
    def cut(counts: Sequence[int], sizes: Sequence[int], slice_bytes: int) -> "Slices":
        """Cut shards of `counts` samples and `sizes` bytes into equal runs of about `slice_bytes`."""
        samples = np.asarray(counts, dtype=np.int64)
        pieces = -(-np.asarray(sizes, dtype=np.int64) // slice_bytes)
        pieces = np.minimum(np.maximum(pieces, 1), samples)
        bounds = np.zeros(int(pieces.sum()) + 1, dtype=np.int64)
        filled, done = 1, 0
        for start in range(0, len(samples), _TOGETHER):
            count, piece = samples[start : start + _TOGETHER], pieces[start : start + _TOGETHER]
            shard = np.repeat(np.arange(len(count)), piece)
            number = np.arange(len(shard)) - np.repeat(np.cumsum(piece) - piece, piece)
            ends = (np.cumsum(count) - count)[shard] + count[shard] * (number + 1) // piece[shard]
            bounds[filled : filled + len(ends)] = done + ends
            filled, done = filled + len(ends), done + int(count.sum())
        return Slices(bounds)


class EpochOrder:
    """The order of one source in one epoch.

    It holds 4 bytes per slice: a source of 10 billion samples has 119 million.
    """

    def __init__(self, slices: Slices, words: tuple[Word, ...], lanes: int, block: int) -> None:
        self._slices = slices
        self._permutation = shuffled(len(slices), *words, "slices").astype(np.min_scalar_type(len(slices)))
        self._words = words
        self._lanes = lanes
        self._block = block
        # The position of every so many slices; those between are added up when asked for.
        steps = range(0, len(slices), _MARK * _TOGETHER)
        sums = [np.add.reduceat(x, np.arange(0, len(x), _MARK)) for x in map(self._lengths, steps, [*steps[1:], None])]
        self._marks = np.cumsum(np.concatenate([[0], *sums]))[:-1]
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
        head = self._slice_at(begin) + number * self._block
        low = max(begin, int(self._positions(head, head)[0]))
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
        total = self._slices.samples
        return total * lane // self._lanes, total * (lane + 1) // self._lanes

    def _slice_at(self, position: int) -> int:
        head = (int(np.searchsorted(self._marks, position, side="right")) - 1) * _MARK
        return head + int(np.searchsorted(self._positions(head, head + _MARK), position, side="right")) - 1

    def _positions(self, head: int, tail: int) -> Ints:
        """Positions at which slices `head` to `tail` of the epoch begin; the end of the epoch is the last one."""
        mark = head // _MARK
        ends: Ints = self._marks[mark] + np.cumsum(np.concatenate([[0], self._lengths(mark * _MARK, tail)]))
        return ends[head - mark * _MARK :]

    def _lengths(self, head: int, tail: int | None) -> Ints:
        """Samples of slices [head, tail) of the epoch."""
        number = self._permutation[head:tail]
        lengths: Ints = self._slices.bounds[1:][number] - self._slices.bounds[number]
        return lengths

    def _block_ids_of(self, lane: int, number: int) -> Ints:
        begin, stop = self._lane(lane)
        head = self._slice_at(begin) + number * self._block
        positions = self._positions(head, head + self._block)
        # A slice on the border of two lanes is split between them.
        low = np.maximum(positions[:-1], begin)
        high = np.minimum(positions[1:], stop)
        length = np.maximum(high - low, 0)
        first = self._slices.bounds[self._permutation[head : head + self._block]] + low - positions[:-1]
        ids = np.repeat(first - (np.cumsum(length) - length), length) + np.arange(int(length.sum()))
        return ids[shuffled(len(ids), *self._words, "block", lane, number)]
