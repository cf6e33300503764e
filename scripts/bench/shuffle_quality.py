"""Mixing of a plan, compared with a uniform shuffle."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmssl.data.order import Position, StreamPlan

NEAR = 5
"""Samples of a source at most this far apart are neighbours."""


@dataclass(frozen=True)
class ShuffleQuality:
    """Means over global batches."""

    shards: float
    """Different shards in a batch."""
    uniform_shards: float
    """The same for a uniform shuffle."""
    neighbours: float
    """Samples with another one in the batch that stands at most 5 places away in its source."""
    uniform_neighbours: float
    """The same for a uniform shuffle."""


def upcoming(plan: StreamPlan, position: Position, batch_size: int, batches: int) -> list[list[tuple[int, int]]]:
    """The next global batches: the source and the number within it of every sample, in order."""
    found = []
    for _ in range(batches):
        position = plan.start(position, batch_size)
        batch = [(0, 0)] * batch_size
        for run in plan.runs(position, batch_size, 0, batch_size):
            for slot, number in zip(run.slots.tolist(), plan.ids(run).tolist(), strict=True):
                batch[slot] = (run.source, number)
        found.append(batch)
        position = plan.after(position, batch_size)
    return found


def shuffle_quality(
    plan: StreamPlan, counts: Sequence[Sequence[int]], batch_size: int, batches: int, seed: int = 0
) -> ShuffleQuality:
    """Measure the first batches of an epoch. `counts` are the samples of each source's shards."""
    bounds = [np.cumsum(source) for source in counts]
    rng = np.random.default_rng(seed)
    measured = []
    for batch in upcoming(plan, Position(), batch_size, batches):
        row = np.zeros(4)
        for source, ends in enumerate(bounds):
            numbers = np.array([number for s, number in batch if s == source], dtype=np.int64)
            uniform = rng.choice(int(ends[-1]), size=len(numbers), replace=False)
            row += [*_measure(numbers, ends), *_measure(uniform, ends)]
        measured.append(row / [1, batch_size, 1, batch_size])
    shards, neighbours, uniform_shards, uniform_neighbours = np.mean(measured, axis=0).tolist()
    return ShuffleQuality(shards, uniform_shards, neighbours, uniform_neighbours)


def _measure(numbers: NDArray[np.int64], ends: NDArray[np.int64]) -> tuple[int, int]:
    """Different shards, and samples with a neighbour."""
    shards = len(np.unique(np.searchsorted(ends, numbers, side="right")))
    near = np.diff(np.sort(numbers)) <= NEAR
    has_neighbour = np.concatenate([near, [False]]) | np.concatenate([[False], near])
    return shards, int(has_neighbour[: len(numbers)].sum())
