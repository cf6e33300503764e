"""The large set made up for measuring plans is a real one, and its resumed batch is the right one."""

from pathlib import Path

import pytest

from mmssl.data.order import Position, StreamPlan, default_lanes
from mmssl.data.shards import SampleLimits, index_shards
from mmssl.data.sources.catalog import plan_source
from scripts.bench.plan import _begin, _shards, _write_set, bench_plan

BATCH = 16


def test_new_and_resumed_runs_read_the_batches_of_the_plan(tmp_path: Path) -> None:
    """The first batch, and the one in the middle of the second epoch, are those of a plan that is walked to there."""
    _write_set(tmp_path, per_shard=13, shards=9)
    shards = _shards(tmp_path)
    assert len(shards) == 9
    source = plan_source(index_shards(shards, SampleLimits()), 1.0, None)
    plan = StreamPlan([source], seed=0, lanes=default_lanes(BATCH), block=8)
    assert source.samples == 117

    def ids(position: Position) -> list[int]:
        return [int(n) for run in plan.runs(position, BATCH, 0, BATCH) for n in plan.ids(run)]

    assert _begin(tmp_path, BATCH, 0.0).ids == ids(Position())
    position = Position()
    for _ in range(plan.batches_per_epoch(BATCH) + plan.batches_per_epoch(BATCH) // 2):
        position = plan.after(plan.start(position, BATCH), BATCH)
    assert _begin(tmp_path, BATCH, 0.5).ids == ids(plan.start(position, BATCH))


@pytest.mark.slow
def test_the_whole_measurement() -> None:
    """Each part in a process of its own; a plan of more samples takes more memory; the text has all figures."""
    small, large = (bench_plan(samples, shards, BATCH) for samples, shards in ((400, 4), (400_000, 2000)))
    assert "400 samples in 4 shards" in small.text()
    assert small.text().count("\n") == 5
    assert 0 <= small.order.extra_bytes < large.order.extra_bytes
    fresh, resumed = large.begins.values()
    assert len(set(resumed.ids) | set(fresh.ids)) > BATCH


def test_indexes_alone_are_measured_without_files() -> None:
    """The order of 20 million samples in 20,000 shards: their indexes take 200 to 600 bytes a shard, and what stays of
    the plan is less than its peak. Nothing is written."""
    found = bench_plan(20_000_000, 20_000, BATCH, files=False)
    assert found.begins == {}
    assert 200 < found.order.index_bytes / 20_000 < 600
    assert 0 < found.order.kept_bytes <= found.order.extra_bytes
