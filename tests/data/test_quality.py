"""The measure of mixing tells good plans from bad ones, and the page that explains the order is right."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmssl.data.order import PlannedSource, Position, Slices, StreamPlan, default_slice_bytes
from scripts.bench.shuffle_quality import shuffle_quality, upcoming
from tests.helpers.docs_blocks import blocks

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def plan_of(counts: list[int], size: int, slice_bytes: int, lanes: int, block: int) -> StreamPlan:
    """One source of samples of `size` bytes."""
    total = sum(counts) * size
    slices = Slices.cut(counts, [n * size for n in counts], slice_bytes)
    source = PlannedSource(slices, 1.0, "x", slices.unit(total))
    return StreamPlan([source], seed=3, lanes=lanes, block=block)


def test_a_small_set_is_mixed_like_a_uniform_shuffle() -> None:
    """With single-sample slices, shards and neighbours in a batch are those of a uniform shuffle."""
    counts = [700, 650, 650]
    quality = shuffle_quality(plan_of(counts, 9000, 1, 64, 8), [counts], 64, 31)
    assert quality.shards == quality.uniform_shards == 3
    assert quality.neighbours == pytest.approx(quality.uniform_neighbours, abs=0.06)


@pytest.mark.parametrize(("shards", "remote", "factor"), [(160, False, 1.1), (1600, False, 9), (160, True, 5)])
def test_large_sets_come_close_and_no_shuffle_does_not(shards: int, remote: bool, factor: float) -> None:
    """Shards of 1,000 samples of 100 kB with the default slices, against whole shards read in order."""
    counts, size = [1000] * shards, 100_000
    slices = default_slice_bytes(sum(counts) * size, remote)
    good = shuffle_quality(plan_of(counts, size, slices, 64, 8), [counts], 4096, 2)
    assert good.shards > 0.95 * good.uniform_shards
    assert good.neighbours < factor * good.uniform_neighbours
    poor = shuffle_quality(plan_of(counts, size, 1 << 40, 4, 1), [counts], 4096, 2)
    assert poor.shards < 0.2 * poor.uniform_shards
    assert poor.neighbours > 1.1 * good.neighbours


def test_neighbours_and_shards_are_counted_as_said() -> None:
    """A batch that is a whole shard has one shard and only neighbours."""
    counts = [10] * 8
    quality = shuffle_quality(plan_of(counts, 1 << 20, 10 << 20, 1, 1), [counts], 10, 8)
    assert quality.shards == 1
    assert quality.neighbours == 1


def test_the_order_by_hand_is_the_order_of_the_stream() -> None:
    """The code of docs/data.md, run as it stands there, gives every batch of two epochs."""
    (block,) = blocks(PAGE, "python")
    names: dict[str, Any] = {}
    exec(block.code, names)
    counts, sizes = [7, 30, 1, 11, 25, 64], [700, 2000, 90, 1500, 2500, 3000]
    slices = Slices.cut(counts, sizes, 400)
    for seed, lanes, block in ((0, 1, 1), (1, 3, 2), (9, 6, 5)):
        plan = StreamPlan([PlannedSource(slices, 1.0, "x")], seed=seed, lanes=lanes, block=block)
        for epoch in (0, 5):
            orders = [names["lane_order"](counts, sizes, 400, seed, lanes, block, epoch, lane) for lane in range(lanes)]
            depth = 12 // lanes
            count = plan.batches_per_epoch(12)
            found = upcoming(plan, Position(epoch, 0), 12, count)
            for t, batch in enumerate(found):
                assert [number for _, number in batch] == [
                    number for order in orders for number in order[t * depth : (t + 1) * depth]
                ]
            assert sorted(np.concatenate(orders).tolist()) == list(range(sum(counts)))
